"""Real processes that fill a cache, killed with SIGKILL at counted events or side by side."""

import random
import signal

import numpy as np
import pytest
import torch
from cache_contents import assert_same, contents
from cache_folders import killed_at
from processes import Worker, wait_until
from tiny import random_rows, tiny_model

from fastdpo.reference import ReferenceCache, fill, fill_cache, model_fingerprint

PASSES = 2  # a shard
ROWS, SEQUENCES = 7, 14


def rows():
    return random_rows(ROWS, seed=11, prompt=(5, 30), answer=(10, 40))


def fill_folder(folder, seed=0, before_pass=None):
    """What a process does. A fixed number of threads, so that sums are rounded alike in each.

    before_pass  called before the results of each pass are kept
    """
    torch.set_num_threads(1)
    fill.PASSES_PER_SHARD = PASSES
    if before_pass is not None:
        original = fill._Running

        def counting(*of):
            before_pass()
            return original(*of)

        fill._Running = counting
    some = rows()
    random.Random(seed).shuffle(some)
    model = tiny_model()
    return fill_cache(model, some, ReferenceCache(folder, model_fingerprint(model)), max_tokens=100, progress=False)


def fill_until(step, folder):
    """Killed at its step-th event, which is a pass, or a file that is about to be flushed, named or deleted."""
    killed_at(step, fill_folder, folder, passes=True)


def fill_until_stopped(folder, seed):
    """Stops for good at its third pass, and says so."""
    passes = []

    def stop():
        passes.append(1)
        if len(passes) == 3:
            (folder.parent / "stopped").touch()
            signal.pause()

    fill_folder(folder, seed, before_pass=stop)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The contents of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    Worker(folder, fill_folder, folder / "c").end()
    whole = contents(folder / "c")
    assert len(whole) == SEQUENCES and len(list((folder / "c").glob("shard-*"))) > 3
    return whole


@pytest.mark.slow
def test_killed_at_every_event(tmp_path, undisturbed):
    held_then = []
    for step in range(1, 1000):
        folder = tmp_path / str(step)
        code = Worker(tmp_path, fill_until, step, folder).end(0, -signal.SIGKILL)
        finished = {shard.name: shard.read_bytes() for shard in folder.glob("shard-*.parquet")}
        held = contents(folder) if finished else {}
        again = fill_folder(folder)
        assert again.found == len(held) and again.computed == SEQUENCES - len(held)
        assert_same(contents(folder), undisturbed, exactly=True)
        for name, data in finished.items():
            assert (folder / name).read_bytes() == data
        assert not list(folder.glob("*.damaged"))
        held_then.append(len(held))
        if code == 0:
            break
    assert held_then == sorted(held_then) and held_then[0] == 0 and held_then[-1] == SEQUENCES
    assert step > 20 and len(set(held_then)) > 3  # after each shard, and at several events between two of them


@pytest.mark.slow
def test_killed_again_and_again_it_comes_to_an_end(tmp_path, undisturbed):
    """Each run is killed a little after its first shard, and the next goes on from there."""
    held = []
    for _ in range(SEQUENCES):
        code = Worker(tmp_path, fill_until, 8, tmp_path / "c").end(0, -signal.SIGKILL)
        held.append(len(contents(tmp_path / "c")))
        if code == 0:
            break
    assert code == 0 and len(held) > 3 and held == sorted(held)
    assert_same(contents(tmp_path / "c"), undisturbed, exactly=True)


@pytest.mark.slow
def test_two_writers_at_once(tmp_path, undisturbed):
    folder = tmp_path / "c"
    killed = Worker(tmp_path, fill_until_stopped, folder, 2)
    wait_until((tmp_path / "stopped").exists, killed, lambda: {"killed": killed.printed()})
    writers = [Worker(tmp_path, fill_folder, folder, seed) for seed in range(2)]
    for writer in writers:
        writer.end()
    killed.kill()
    killed.end(-signal.SIGKILL)
    assert_same(contents(folder), undisturbed)
    keys = np.frombuffer(b"".join(undisturbed), np.uint8).reshape(-1, 16)
    assert ReferenceCache(folder).lookup(keys)[0].all()
    assert fill_folder(folder, seed=5).computed == 0
