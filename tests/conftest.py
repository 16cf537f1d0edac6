"""Set-up of the whole suite: Triton's interpreter where there is no GPU, NaN in fresh memory, one thread a worker."""

import functools
import gc
import itertools
import os
import shutil
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

import drawing
import pytest
import triton_interpreter

triton_interpreter.mend()

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers of two threads each on two cores wait for one another most of the time.
    torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--fast",
        action="store_true",
        help="no slow test, and of each other one the first and last case, or a tenth of the drawn ones",
    )
    parser.addoption(
        "--gpu-only", action="store_true", help="what works on the GPU where there is one, and nothing else"
    )


def pytest_configure(config):
    if config.getoption("--fast"):
        drawing.share = 0.1
    memory = Path("/dev/shm")
    if memory.is_dir() and shutil.disk_usage(memory).free > 4 << 30:
        # Nobody waits for a disk; what a passed test leaves behind goes at once (pyproject.toml).
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


def pytest_report_header():
    return f"torch {torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}"


def pytest_collection_modifyitems(config, items):
    if config.getoption("--gpu-only"):
        _keep(config, items, {item for item in items if _works_on_the_gpu(item)})
    if config.getoption("--fast"):
        _keep_few(config, items)
    if "PYTEST_XDIST_WORKER" in os.environ:
        items[:] = _long_ones_first(items)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish(session):
    if "accelerate.utils.imports" in sys.modules:
        # Asked some fifty times a training, and each time answered from the disk.
        imports = sys.modules["accelerate.utils.imports"]
        imports._is_package_available = functools.cache(imports._is_package_available)
    # Every training ends in a collection, which would look at all that pytest has imported.
    gc.collect()
    gc.freeze()


def _keep_few(config, items):
    """Of each test function the first and the last case, those marked slow left out; where models train, the first."""
    cases = {}
    for item in items:
        if not item.get_closest_marker("slow"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {own[0] for own in cases.values()}
    kept |= {own[-1] for own in cases.values() if own[0].path.parent.name not in ("trainer", "models", "kernels")}
    _keep(config, items, kept)


def _keep(config, items, kept):
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def _works_on_the_gpu(item):
    """Whether it is marked so, or a parameter says where it works: "cuda", or "triton" (see `tiny.device_for`)."""
    if item.get_closest_marker("gpu") or item.get_closest_marker("device"):
        return True
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    places = {
        place for value in values for place in (value if isinstance(value, tuple) else (value,)) if str is type(place)
    }
    return not places.isdisjoint(("cuda", "triton"))


def _long_ones_first(items):
    """The same tests, such that two workers, each beginning with one half, come to the short ones last.

    A worker that has done its half takes over tests from the end of the other's: so neither is left with long ones.
    Modules stay whole, for their fixtures.
    """
    modules = {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    long = [own for own in modules.values() if any(item.get_closest_marker("slow") for item in own)]
    short = [item for own in modules.values() if own not in long for item in own]
    halves = [[item for own in long[start::2] for item in own] for start in (0, 1)]
    share = max(0, len(items) // 2 - len(halves[0]))
    return [*halves[0], *short[:share], *halves[1], *short[share:]]


@pytest.fixture(autouse=True)
def nan_filled_memory():
    """What reads memory that it did not write gives NaN, not luck."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def new_paths(tmp_path_factory):
    """Paths where nothing is yet: most tests put nothing there, and thousands of folders take their time."""
    folder = tmp_path_factory.mktemp("fastdpo-caches")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def private_cache(new_paths, monkeypatch):
    """Reference log-probs of a test go to a folder of its own."""
    monkeypatch.setenv("FASTDPO_CACHE", str(next(new_paths)))


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory):
    """The demo's model as safetensors, converted once for all workers of this run (`make test` installs it)."""
    import importlib.util

    from filelock import FileLock

    from fastdpo.demo import GGUF_PACKAGE, prepare_model

    if importlib.util.find_spec(GGUF_PACKAGE) is None:
        pytest.skip("the demo's model is not installed (make test installs it)")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with FileLock(shared / "demo-model.lock"):
        return prepare_model(shared / "demo-model")


@pytest.fixture
def scored(monkeypatch):
    """A list that grows by the number of completions in each pass of the reference."""
    from fastdpo.reference import fill

    counts, original = [], fill._Running

    def counting(done, sizes, logps):
        counts.append(len(sizes))
        return original(done, sizes, logps)

    monkeypatch.setattr(fill, "_Running", counting)
    return counts


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A tiny model with its tokenizer, as a command is given one."""
    from tiny import tiny_model, word_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)
