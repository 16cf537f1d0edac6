"""Folders of reference log-probs to test with."""

import itertools
import os
import signal
import textwrap
import threading

import numpy as np
import pytest
from processes import run
from tqdm.auto import tqdm

from fastdpo.reference import prune as prune_module
from fastdpo.reference.folder import Kind
from fastdpo.reference.shard import row_sums, write_shard

FINGERPRINT = {"weights": "a" * 32, "adapter": "none", "config": "b" * 32, "dtype": "float32"}
KIND = Kind(True, FINGERPRINT)


def values(count, seed=0, most=9):
    draw = np.random.default_rng(seed)
    return {draw.bytes(16): -draw.exponential(size=draw.integers(0, most)).astype(np.float32) for _ in range(count)}


def columns_of(expected):
    """Keys, tokens and sums of a dict of log-probs, and all log-probs one after the other."""
    keys = np.frombuffer(b"".join(expected), np.uint8).reshape(-1, 16)
    tokens, flat = np.array([len(value) for value in expected.values()]), np.concatenate(list(expected.values()))
    return keys, tokens, row_sums(flat, tokens), flat


def write_foreign(path, kind, expected):
    keys, tokens, sums, flat = columns_of(expected)
    with open(path, "wb") as file:
        write_shard(file, kind, keys, tokens, sums, [flat])


def check(cache, expected, absent=()):
    """The cache holds what the dict holds, by every way of asking."""
    keys = [*expected, *absent]
    assert len(cache) == len(expected)
    found, sums, tokens = cache.lookup(keys)
    assert (found.dtype, sums.dtype, tokens.dtype) == (bool, np.float64, np.int32)
    assert found.tolist() == [True] * len(expected) + [False] * len(absent) == [key in cache for key in keys]
    assert np.isnan(sums[len(expected) :]).all() and not tokens[len(expected) :].any()
    for value, total, count in zip(expected.values(), sums, tokens, strict=False):
        assert count == len(value)
        assert total == pytest.approx(float(value.sum(dtype=np.float64)), rel=1e-6, abs=1e-12)
    if cache.per_token:
        for one, value in zip(cache.logps(list(expected)), expected.values(), strict=True):
            assert one.dtype == np.float32 and one.tobytes() == value.tobytes()
    array = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 16)
    for one, other in zip(cache.lookup(array), (found, sums, tokens), strict=True):
        np.testing.assert_array_equal(one, other)


def shard_of(folder):
    (shard,) = folder.glob("shard-*.parquet")
    return shard


def shards_of(folder):
    return sorted(folder.glob("shard-*.parquet"))


def flip(shard, position, bits=0x10):
    data = bytearray(shard.read_bytes())
    data[position] ^= bits
    shard.write_bytes(data)


def flip_log_prob(shard, group=0):
    """Damage that reading the index does not meet."""
    import pyarrow.parquet as pq

    place = pq.read_metadata(shard).row_group(group).column(3)
    flip(shard, place.data_page_offset + place.total_compressed_size - 2)


def contents(folder):
    """Every file with its bytes."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def run_python(script, *arguments):
    return run("-c", textwrap.dedent(script), *arguments).stdout


def killed_at(step, work, *arguments, passes=False):
    """Works, and kills its process as it is about to flush, name or delete a file for the step-th time.

    passes  also as the results of a reference's pass are about to be kept
    """
    tqdm.set_lock(threading.RLock())  # its own is of all processes, and would be left behind
    steps = itertools.count(1)

    def deadly(call):
        def wrapped(*args, **options):
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return wrapped

    for name in ("fsync", "replace", "link", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    if passes:
        from fastdpo.reference import fill

        fill._Running = deadly(fill._Running)
    work(*arguments)


def prune_into_shards_of_100(folder):
    prune_module.SHARD_ROWS = 100
    prune_module.prune(folder)
