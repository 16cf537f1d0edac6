"""Real processes that fill a cache, killed with SIGKILL or side by side."""

import multiprocessing
import random
import signal
import time

import numpy as np
import pytest
import torch
from cache_contents import assert_same, contents
from tiny import random_rows, tiny_model

from fastdpo.reference import ReferenceCache, fill, fill_cache, model_fingerprint

MODULES = ["torch", "transformers.models.llama.modeling_llama", "fastdpo.reference", "tiny"]
PASSES = 3  # a shard


@pytest.fixture(scope="module")
def processes():
    """Forked from a server that has imported everything, so that a run is under way within moments."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    return context


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, processes):
    """The contents of a run that nobody disturbs, and the seconds it takes."""
    folder = tmp_path_factory.mktemp("undisturbed") / "c"
    _, seconds = run(processes, folder)
    whole = contents(folder)
    assert len(whole) == 120 and len(list(folder.glob("shard-*"))) > 15
    return whole, seconds


def rows():
    return random_rows(60, seed=11, prompt=(5, 30), answer=(10, 40))


def fill_folder(folder, began, seed):
    """What a process does. A fixed number of threads, so that sums are rounded alike in each."""
    torch.set_num_threads(1)
    fill.PASSES_PER_SHARD = PASSES
    some = rows()
    random.Random(seed).shuffle(some)
    model = tiny_model()
    cache = ReferenceCache(folder, model_fingerprint(model))
    began.set()
    return fill_cache(model, some, cache, max_tokens=100, progress=False)


def run(processes, folder, kill_after=None, seed=0):
    """Runs a process to its end or kills it; its exit code, and the seconds from its first row."""
    began = processes.Event()
    process = processes.Process(target=fill_folder, args=(folder, began, seed))
    process.start()
    assert began.wait(120)
    start = time.perf_counter()
    if kill_after is not None:
        time.sleep(kill_after)
        process.kill()  # SIGKILL
    process.join(120)
    return process.exitcode, time.perf_counter() - start


@pytest.mark.slow
def test_killed_at_twenty_moments(tmp_path, processes, undisturbed):
    whole, seconds = undisturbed
    draw = random.Random(0)
    killed, held_then = 0, []
    for moment in range(20):
        folder = tmp_path / str(moment)
        code, _ = run(processes, folder, kill_after=draw.uniform(0, seconds))
        killed += code == -signal.SIGKILL
        finished = {shard.name: shard.read_bytes() for shard in folder.glob("shard-*.parquet")}
        held = contents(folder) if finished else {}
        again = fill_folder(folder, processes.Event(), seed=0)
        assert again.found == len(held) and again.computed == 120 - len(held)
        assert_same(contents(folder), whole, exactly=True)
        for name, data in finished.items():
            assert (folder / name).read_bytes() == data
        assert not list(folder.glob("*.damaged"))
        held_then.append(len(held))
    assert killed >= 12 and len(set(held_then)) >= 5, held_then  # at different stages of the work


@pytest.mark.slow
def test_killed_again_and_again_it_comes_to_an_end(tmp_path, processes, undisturbed):
    whole, seconds = undisturbed
    draw = random.Random(1)
    for _ in range(6):
        run(processes, tmp_path / "c", kill_after=draw.uniform(0, seconds / 2))
    code, _ = run(processes, tmp_path / "c")
    assert code == 0
    assert_same(contents(tmp_path / "c"), whole, exactly=True)


@pytest.mark.slow
def test_two_writers_at_once(tmp_path, processes, undisturbed):
    whole, _ = undisturbed
    folder = tmp_path / "c"
    began = [processes.Event() for _ in range(3)]
    writers = [processes.Process(target=fill_folder, args=(folder, event, seed)) for seed, event in enumerate(began)]
    for writer in writers:
        writer.start()
    assert began[2].wait(120)
    writers[2].kill()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, -signal.SIGKILL]
    assert_same(contents(folder), whole)
    keys = np.frombuffer(b"".join(whole), np.uint8).reshape(-1, 16)
    assert ReferenceCache(folder).lookup(keys)[0].all()
    assert fill_folder(folder, processes.Event(), seed=5).computed == 0
