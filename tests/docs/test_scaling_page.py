"""docs/scaling.md shows what its formulas give, and the formulas what the code does."""

import io
import tracemalloc

import numpy as np
import pytest
import torch
from checkout import load
from tiny import tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig

from fastdpo.reference.fill import PASSES_PER_SHARD, SECONDS_PER_SHARD, TOKENS_PER_PASS
from fastdpo.reference.folder import Kind
from fastdpo.reference.index import ShardIndex
from fastdpo.reference.shard import group_tokens, row_sums, write_shard
from fastdpo.reference.work import WINDOW_ROWS
from fastdpo.trainer.metrics import StepFlops

scaling = load("docs/scaling.py")
M, Model, Pair = scaling.M, scaling.Model, scaling.Pair


def test_the_page_is_up_to_date(monkeypatch, capsys):
    assert scaling.main(["--check"]) == 0
    monkeypatch.setitem(scaling.TABLES, "speed", lambda: "| |\n")
    assert scaling.main(["--check"]) == 1 and "run: python docs/scaling.py" in capsys.readouterr().out


def test_every_table_is_on_the_page_and_filled():
    text = scaling.PAGE.read_text()
    for name in scaling.TABLES:
        assert text.count(f"<!-- table: {name} -->\n| ") == 1, name
    assert text.count("<!-- table:") == len(scaling.TABLES)


def test_parameters_are_those_of_the_model():
    assert M.parameters == pytest.approx(70.55e9, rel=1e-3)
    config = LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) == M.parameters


def test_parameters_of_adapters():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert trained == Model(32, 64, 2, 4, 2, 97).lora(4)


def test_flops_are_those_that_the_trainer_counts():
    """But for attention scores, which it leaves out, and norms, which are no matrices."""
    tiny, pair = Model(32, 64, 2, 4, 2, 97), Pair(10, (5, 7))
    counted = StepFlops.of(tiny_model(tie_word_embeddings=False))
    wanted = counted.per_token * pair.shared + counted.per_target * pair.targets
    attention = 14 * tiny.layers * tiny.hidden * pair.attended
    norms = 6 * 2 * tiny.layers * tiny.hidden * pair.shared
    assert scaling.training_flops(pair, tiny) - attention - norms == pytest.approx(wanted)


def test_memory_adds_up():
    assert scaling.states(4, 4, 8, 1) == 16 * M.parameters == 1000 * scaling.states(4, 4, 8, 1000)
    parts = scaling.memory_parts(1000, 8192)
    text = scaling.memory_table()
    assert f"**{scaling.gb(sum(parts.values()))}**" in text
    assert scaling.layer_activations(1) * M.layers > scaling.checkpointed(1)


def test_sharing():
    pair = Pair(190, (320, 270))
    assert pair.saved == pytest.approx(190 / (2 * 190 + 320 + 270)) == pytest.approx(1 - pair.shared / pair.unshared)
    assert Pair(10, (4, 4)).attended == 10 * 10 / 2 + 2 * (4 * 10 + 4 * 4 / 2)


def test_communication():
    assert scaling.collective(450e9 * 0.8, 1, 0) == 0.0
    assert scaling.collective(400e9 * 0.8, 1000, 0) == pytest.approx(0.999)
    each = scaling.sharded_pass(1000)
    assert each.total == pytest.approx(3 * each.gather) and each.replicas == 0.0
    tokens = each.tokens_to_hide()
    assert tokens * scaling.token_seconds() / 4 >= each.gather > (tokens - 1) * scaling.token_seconds() / 4


def test_the_interval_between_checkpoints_loses_the_least():
    between = scaling.mean_time_between_failures(1000)
    best = scaling.best_interval(85.0, between)
    least = scaling.lost_share(best, 85.0, between, 600.0)
    assert all(scaling.lost_share(best * factor, 85.0, between, 600.0) > least for factor in (0.8, 1.25))


def test_bytes_of_the_reference():
    assert (TOKENS_PER_PASS["cuda"], PASSES_PER_SHARD, SECONDS_PER_SHARD, WINDOW_ROWS) == (
        scaling.PASS_TOKENS, scaling.SHARD_PASSES, scaling.SHARD_SECONDS, scaling.WINDOW_ROWS,
    )  # fmt: skip
    draw, n = np.random.default_rng(0), 8192
    tokens = draw.integers(150, 440, n).astype(np.int32)
    keys, flat = draw.integers(0, 256, (n, 16), dtype=np.uint8), -draw.random(int(tokens.sum()), dtype=np.float32)
    groups = np.split(flat, group_tokens(tokens).cumsum()[:-1])
    for per_token in (True, False):
        file = io.BytesIO()
        write_shard(file, Kind(per_token, {}), keys, tokens, row_sums(flat, tokens), groups if per_token else None)
        assert len(file.getvalue()) == pytest.approx(scaling.shard_bytes(n, tokens.mean(), per_token), rel=0.01)


def test_bytes_of_the_index():
    draw, n, index = np.random.default_rng(0), 100_000, ShardIndex()
    columns = draw.integers(0, 256, (n, 16), dtype=np.uint8), np.full(n, 300, np.int32), np.zeros(n)
    tracemalloc.start()
    index.add([("shard", *columns)])
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / n == pytest.approx(scaling.INDEX_BYTES, rel=0.02) and peak / n <= scaling.INDEX_PEAK * 1.02
