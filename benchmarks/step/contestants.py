"""The contestants of the train-step benchmark: the same pairs, the same reference sums, the same loss, in six ways.

prefix, varlen, padded  fastdpo.batch_loss with each packing
naive                   chosen and rejected in a padded forward each, all logits: a script without a library
plain                   the same in one padded forward of both
trl                     the loss of TRL's own DPOTrainer, where TRL is installed
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from flops import Work
from torch import Tensor

import fastdpo
from fastdpo.attention import ATTENTION_NAME, register
from fastdpo.verify import ensure_verified

BETA = 0.1
PACKINGS = ("prefix", "varlen", "padded")
TRL_NEEDS = ("trl", "datasets")

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Contestant:
    attention: str  # that the model is set to before its step
    loss: Callable[[], Tensor]
    work: Work


class Contestants:
    """All of them for one model. TRL's trainer, which gives the model another forward, is made once."""

    def __init__(self, model: Any, device: torch.device) -> None:
        register()
        self.model, self.device = model, device
        self.trainer: Any = None  # or why there is none
        if all(importlib.util.find_spec(package) is not None for package in TRL_NEEDS):
            try:
                self.trainer = trl_step_trainer(model)
            except Exception as error:  # a peer's own fault, and the others are to be measured
                self.trainer = error

    def of(self, rows: Rows) -> dict[str, Contestant | Exception | None]:
        """None is for what is not installed, an exception for what could not be made."""
        batches = {name: fastdpo.PreferenceCollator(packing=name)(rows).to(self.device) for name in PACKINGS}
        padded = both_sides(batches["padded"])
        refs = self.reference(batches["padded"])
        without_trl = self.trainer is None or isinstance(self.trainer, Exception)
        return {
            **{name: self.packed(batch, refs) for name, batch in batches.items()},
            "naive": self.logits(padded.apart(), refs),
            "plain": self.logits([padded], refs),
            "trl": self.trainer if without_trl else self.trl(rows, refs),
        }

    def reference(self, batch: Any) -> Tensor:
        """(2B,): the policy's own sums, some nats aside, so that the pairs differ in loss and in weight."""
        with torch.no_grad():
            sums = fastdpo.sequence_logps(self.model, batch)
        generator = torch.Generator().manual_seed(0)
        return sums + 10 * torch.rand(len(sums), generator=generator).to(sums)

    def packed(self, batch: Any, refs: Tensor) -> Contestant:
        ensure_verified(self.model, batch.packing, "auto")  # else a part of the first step

        def loss() -> Tensor:
            return fastdpo.batch_loss(self.model, batch, refs, beta=BETA, token_metrics=False).loss

        return Contestant(ATTENTION_NAME, loss, packed_work(batch))

    def logits(self, sides: list[PaddedRows], refs: Tensor) -> Contestant:
        def loss() -> Tensor:
            sums = torch.cat([side.sums(self.model) for side in sides])
            chosen, rejected = (sums - refs).chunk(2)
            return -F.logsigmoid(BETA * (chosen - rejected)).mean()

        positions = [side.position_ids for side in sides]
        return Contestant("sdpa", loss, work(positions, sum(map(Tensor.numel, positions)), 3))

    def trl(self, rows: Rows, refs: Tensor) -> Contestant:
        chosen, rejected = refs.chunk(2)
        referenced = [
            {**row, "ref_chosen_logps": c, "ref_rejected_logps": r}
            for row, c, r in zip(rows, chosen.tolist(), rejected.tolist(), strict=True)
        ]
        inputs = {name: value.to(self.device) for name, value in self.trainer.data_collator(referenced).items()}

        def loss() -> Tensor:
            return self.trainer.compute_loss(self.model, inputs)

        return Contestant("sdpa", loss, trl_work(inputs, self.device))


def work(position_ids: list[Tensor], head_tokens: int, head_products: int) -> Work:
    """A token attends to as many tokens as stand before it, and to itself."""
    tokens = sum(positions.numel() for positions in position_ids)
    keys = sum(int(positions.sum()) for positions in position_ids) + tokens
    return Work(tokens, keys, head_tokens, head_products)


def packed_work(batch: Any) -> Work:
    """Of a PreferenceBatch."""
    return work([batch.position_ids], len(batch.target_ids), 3)


def trl_work(inputs: Any, device: torch.device) -> Work:
    """Of a batch of TRL's. Its head scores completion tokens alone on a GPU, on a CPU all positions but the last."""
    shape = inputs["input_ids"].shape
    positions = torch.arange(shape[1]).expand(shape)
    on_gpu = device.type == "cuda"
    head_tokens = int(inputs["completion_mask"][:, 1:].sum()) if on_gpu else shape[0] * (shape[1] - 1)
    return work([positions], head_tokens, 4)


@dataclass(frozen=True)
class PaddedRows:
    """All (S, T); `counted` is 1 where the token at the next position is a completion's."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    counted: Tensor

    def sums(self, model: Any) -> Tensor:
        """(S,) sums of the completions' log-probs, from all logits."""
        logits = model(input_ids=self.input_ids, attention_mask=self.attention_mask, use_cache=False).logits[:, :-1]
        logps = torch.log_softmax(logits.float(), -1).gather(-1, self.input_ids[:, 1:, None]).squeeze(-1)
        return (logps * self.counted[:, :-1]).sum(1)

    def apart(self) -> list[PaddedRows]:
        """The first half of the rows and the second, each no wider than its own longest row."""
        halves = zip(*(getattr(self, field.name).chunk(2) for field in fields(self)), strict=True)
        return [PaddedRows(*(each[:, : int(half[1].sum(1).max())] for each in half)) for half in halves]


def both_sides(batch: Any) -> PaddedRows:
    """Of a padded PreferenceBatch: chosen rows first."""
    counted = torch.zeros(batch.input_ids.numel(), device=batch.input_ids.device)
    counted[batch.target_rows] = 1.0
    return PaddedRows(batch.input_ids, batch.attention_mask, batch.position_ids, counted.view_as(batch.input_ids))


def trl_step_trainer(model: Any) -> Any:
    """TRL's DPOTrainer around the model, for its `data_collator` and `compute_loss`."""
    from datasets import Dataset
    from workloads import word_tokenizer

    rows = Dataset.from_list([{"prompt": "t3", "chosen": " t4", "rejected": " t5"}])
    # No autocast: the model has its dtype. Checkpointing of the model is set for all contestants alike.
    return trl_trainer(model, rows, word_tokenizer(8), bf16=False, gradient_checkpointing=False)


def trl_trainer(model: Any, rows: Any, tokenizer: Any, **options: Any) -> Any:
    """TRL's DPOTrainer for batches that carry the reference's log-probs; it writes nothing.

    It is made as one without cached reference log-probs, with a toy for a reference model, because it would otherwise
    hash the model and fill its cache first; then it is told that the batches carry them.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig
    from trl import DPOConfig, DPOTrainer

    toy = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(output_dir=folder, beta=BETA, max_length=None, report_to=[], save_strategy="no", **options)
        trainer = DPOTrainer(
            model=model,
            ref_model=AutoModelForCausalLM.from_config(toy),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
        )
    trainer.precompute_ref_logps = True
    return trainer
