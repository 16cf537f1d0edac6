"""The reference cache: right values, kept by content, safe against crashes and wrong models."""

import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch
from tiny import naive_sequence_logps, random_rows, tiny_model

from fastdpo.reference import ReferenceCache, model_fingerprint, precompute, reference_columns
from fastdpo.reference.fingerprint import sequence_key
from fastdpo.types import UserError

FINGERPRINT = {"weights": "a" * 32, "config": "b" * 32, "dtype": "float32"}


def values(count, seed=0):
    draw = np.random.default_rng(seed)
    return {draw.bytes(16): draw.normal(size=draw.integers(0, 9)).astype(np.float32) for _ in range(count)}


@pytest.mark.parametrize("packing", ["prefix", "varlen", "padded"])
@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_values_equal_the_model_run_alone(tmp_path, packing, max_tokens):
    model, rows = tiny_model(), random_rows(7, seed=1)
    cache = precompute(model, rows, tmp_path / "c", packing=packing, max_tokens=max_tokens, progress=False)
    assert len(cache) == 14
    columns = reference_columns(cache, rows, None, "keep_start")
    exact = naive_sequence_logps(model, rows).view(2, -1)
    torch.testing.assert_close(torch.tensor([*columns.values()]), exact, rtol=1e-5, atol=1e-4)
    assert cache[sequence_key(rows[0]["prompt_ids"], rows[0]["chosen_ids"])].shape == (len(rows[0]["chosen_ids"]),)


def count_passes(monkeypatch):
    """A list that grows by the number of completions scored in each forward pass."""
    import fastdpo.reference.fill as module

    scored, original = [], module.completion_logps

    def counting(model, sequences, **options):
        scored.append(len(sequences))
        return original(model, sequences, **options)

    monkeypatch.setattr(module, "completion_logps", counting)
    return scored


def test_only_what_is_new_is_computed(tmp_path, monkeypatch):
    scored = count_passes(monkeypatch)
    model, rows = tiny_model(), random_rows(20, seed=2)
    precompute(model, rows, tmp_path / "c", progress=False)
    assert sum(scored) == 40
    scored.clear()
    precompute(model, rows[::-1][:15], tmp_path / "c", progress=False)  # another order, a subset
    assert scored == []
    changed = [dict(rows[0], chosen_ids=[4, 4, 4, 4]), *rows[1:], *random_rows(3, seed=9)]
    precompute(model, changed, tmp_path / "c", progress=False)
    assert sum(scored) == 1 + 6


def test_columns_of_rows_that_the_cache_lacks(tmp_path):
    model, rows = tiny_model(), random_rows(4, seed=2)
    cache = precompute(model, rows[:3], tmp_path / "c", progress=False)
    with pytest.raises(UserError, match="lacks 2 of 8 sequences; compute them"):
        reference_columns(cache, rows)


def test_truncation_is_part_of_the_content(tmp_path):
    model, rows = tiny_model(), random_rows(5, seed=3, prompt=(4, 6), answer=(5, 9))
    cache = precompute(model, rows, tmp_path / "c", max_length=8, progress=False)
    cut = [{**r, **{s: r[s][: 8 - len(r["prompt_ids"])] for s in ("chosen_ids", "rejected_ids")}} for r in rows]
    columns = reference_columns(cache, rows, 8, "keep_start")
    torch.testing.assert_close(
        torch.tensor([*columns.values()]), naive_sequence_logps(model, cut).view(2, -1), rtol=1e-5, atol=1e-4
    )


def test_fingerprint_follows_weights_and_config_not_the_path(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    print_of_model = model_fingerprint(model)
    model.save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model_fingerprint(loaded) == print_of_model
    with torch.no_grad():
        next(iter(loaded.parameters())).view(-1)[3] += 1e-3
    assert model_fingerprint(loaded)["weights"] != print_of_model["weights"]
    assert model_fingerprint(model, torch.bfloat16)["dtype"] == "bfloat16"
    other = tiny_model(rms_norm_eps=1e-3)
    assert model_fingerprint(other)["config"] != print_of_model["config"]


def test_keys_tell_prompt_from_completion():
    assert sequence_key([1, 2], [3]) != sequence_key([1], [2, 3])
    assert sequence_key([1, 2], [3]) == sequence_key((1, 2), np.array([3]))
    assert len(sequence_key([], [])) == 16


def test_another_process_reads_what_one_wrote(tmp_path):
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    first, second = values(50, 1), values(30, 2)
    cache.add(first)
    other = ReferenceCache(tmp_path / "c")
    assert other.fingerprint == FINGERPRINT and len(other) == 50
    cache.add(second)
    other.reload()
    for key, value in (first | second).items():
        np.testing.assert_array_equal(other[key], value)
    assert not [name for name in os.listdir(tmp_path / "c") if name.endswith(".tmp")]


def test_wrong_caches_are_refused(tmp_path):
    folder = tmp_path / "c"
    with pytest.raises(UserError, match="no reference cache"):
        ReferenceCache(folder)
    ReferenceCache(folder, FINGERPRINT).add(values(3))
    with pytest.raises(UserError, match=r"another reference model \(dtype float32 there, bfloat16 here\)"):
        ReferenceCache(folder, {**FINGERPRINT, "dtype": "bfloat16"})
    manifest = folder / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        ReferenceCache(folder, FINGERPRINT)
    manifest.write_text(text[:20])
    with pytest.raises(UserError, match="damaged"):
        ReferenceCache(folder, FINGERPRINT)
    manifest.unlink()
    with pytest.raises(UserError, match="shards but no manifest"):
        ReferenceCache(folder, FINGERPRINT)
    with pytest.raises(UserError, match="is a file"):
        ReferenceCache(__file__, FINGERPRINT)


@pytest.mark.parametrize("harm", ["truncate", "flip", "empty"])
def test_a_damaged_shard_is_named_set_aside_and_computed_again(tmp_path, monkeypatch, harm):
    model, rows = tiny_model(), random_rows(6, seed=4)
    cache = precompute(model, rows, tmp_path / "c", progress=False)
    exact = reference_columns(cache, rows, None, "keep_start")
    (shard,) = (tmp_path / "c").glob("shard-*.parquet")
    data = bytearray(shard.read_bytes())
    if harm == "flip":
        data[60] ^= 0x10  # a key: keys and sums are read at the start, log-probs when they are asked for
    shard.write_bytes(data if harm == "flip" else data[:100] if harm == "truncate" else b"")
    scored = count_passes(monkeypatch)
    with pytest.warns(UserWarning, match=rf"{shard.name} is damaged"):
        cache = precompute(model, rows, tmp_path / "c", progress=False)
    assert sum(scored) == 12
    assert shard.with_name(shard.name + ".damaged").exists() and not shard.exists()
    assert reference_columns(cache, rows, None, "keep_start") == exact


def _write_shards(folder, ready):
    cache = ReferenceCache(folder, FINGERPRINT)
    for seed in range(10_000):
        cache.add(values(20, seed))
        ready.set()


@pytest.mark.slow
def test_kill_loses_no_finished_shard(tmp_path):
    context = multiprocessing.get_context("spawn")
    for attempt in range(3):
        ready = context.Event()
        process = context.Process(target=_write_shards, args=(tmp_path / "c", ready))
        process.start()
        assert ready.wait(60)
        time.sleep(0.05 * (attempt + 1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        cache = ReferenceCache(tmp_path / "c", FINGERPRINT)  # a damaged shard would warn, and the suite shows warnings
        shards = len(list((tmp_path / "c").glob("shard-*.parquet")))
        written = {}
        for seed in range(shards):
            written |= values(20, seed)
        held = [key for key in written if key in cache]
        assert len(held) >= 20
        for key in held:
            np.testing.assert_array_equal(cache[key], written[key])
    assert not list((tmp_path / "c").glob("*.damaged"))


def test_interrupted_work_is_kept(tmp_path, monkeypatch):
    import fastdpo.reference.fill as module

    model, rows = tiny_model(), random_rows(8, seed=5)
    original, calls = module.completion_logps, []

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(module, "completion_logps", failing)
    with pytest.raises(KeyboardInterrupt):
        precompute(model, rows, tmp_path / "c", max_tokens=1, progress=False)
    assert len(ReferenceCache(tmp_path / "c")) == 6


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    cache = ReferenceCache(tmp_path / "c", FINGERPRINT)
    cache.path = tmp_path / "file" / "c"
    with pytest.raises(UserError, match="cannot be written"):
        cache.add(values(2))
