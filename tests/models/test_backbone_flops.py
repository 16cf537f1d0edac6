"""The backbone's work is proportional to unique tokens: FLOPs counted on the lengths of real pairs."""

import random
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdpo.models import causal_lm, target_hidden_states
from fastdpo.packing import PreferenceCollator

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "step"))

from workloads import MODELS, hh_lengths

BATCH = 8
EVERY = 4  # of the batches in file order, for time: of all 289 the ratios are 0.248 and 0.618


@pytest.fixture(scope="module")
def model():
    """One layer of SmolLM2-135M, without memory: shapes are all that counts."""
    config = LlamaConfig(**MODELS["135M"] | {"num_hidden_layers": 1})
    with torch.device("meta"):
        return causal_lm(AutoModelForCausalLM.from_config(config))


def products(query, key, value, *args, **kwargs):
    """Those of scaled_dot_product_attention, which on the meta device takes ten times as long to count."""
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, 1) if groups > 1 else tensor for tensor in (key, value))
    return (query @ key.transpose(2, 3)) @ value


def counted(model, batch):
    """FLOPs of forward and backward without the head; in attention, of every key of a segment or row, hidden or not."""
    if batch.packing == "padded":  # transformers would look whether the mask hides anything, and here nobody can
        rows, width = batch.input_ids.shape
        batch["attention_mask"] = torch.empty(rows, 1, width, width, dtype=torch.bool, device="meta")
    with FlopCounterMode(display=False) as counter:
        target_hidden_states(model, batch).sum().backward()
    return counter.get_total_flops()


@pytest.mark.slow
def test_work_is_proportional_to_unique_tokens(model, monkeypatch):
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: False)  # which does not know the meta device
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", products)
    draw = random.Random(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    lengths = hh_lengths()
    flops = dict.fromkeys(("prefix", "varlen", "padded"), 0)
    for first in range(0, len(lengths), BATCH * EVERY):
        rows = [
            {name: draw.choices(range(49152), k=count) for name, count in zip(names, row, strict=True)}
            for row in lengths[first : first + BATCH]
        ]
        for packing in flops:
            flops[packing] += counted(model, PreferenceCollator(packing=packing)(rows).to("meta"))
    assert flops["prefix"] <= 0.27 * flops["padded"]
    assert flops["prefix"] <= 0.62 * flops["varlen"]
