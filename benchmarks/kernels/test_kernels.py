"""The same cases through pytest-benchmark, for its statistics, its histograms and its comparison of saved runs.

    python -m pytest benchmarks/kernels/test_kernels.py                              small on a CPU, full size on a GPU
    python -m pytest benchmarks/kernels/test_kernels.py -k "logits and gradient and not eager" --benchmark-autosave

Needs pytest-benchmark. Each test first asserts that the numbers agree; then work done in a second, share of the ceiling
and memory go into `extra_info`, beside the times. Times are those of the wall clock, the wait for the device included.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "kernels")]

import torch  # noqa: E402
from logprobs import SIZES, ceiling_of, contestants, forget, make_problem  # noqa: E402
from runner import Run, agrees  # noqa: E402
from timing import peak_extra_bytes, synchronize  # noqa: E402
from variants import Unavailable, Variant  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
MODES = {"logits": ("gradient",), "head": ("frozen head", "trainable"), "dpo": ("frozen head", "trainable")}


class Prepared:
    """Inputs of one size, the device's ceiling, and what the variants made of them (compiled code, for one)."""

    current: Prepared | None = None

    def __init__(self, family: str, shape: dict[str, int]) -> None:
        self.family, self.shape = family, shape
        self.problem = make_problem(family, shape, DEVICE)
        self.ceiling = ceiling_of(self.problem)
        self.function = lru_cache(None)(lambda variant: variant.function(self.problem))

    @classmethod
    def get(cls, family: str, shape: dict[str, int]) -> Prepared:
        """One at a time, for the memory's sake; pytest runs the tests in the order of the parameters."""
        if cls.current is None or (cls.current.family, cls.current.shape) != (family, shape):
            cls.drop()
            cls.current = cls(family, shape)
        return cls.current

    @classmethod
    def drop(cls) -> None:
        cls.current = None
        forget()


def parameters() -> list[Any]:
    made = []
    for family, shape in SIZES["cuda" if ON_GPU else "tiny"]:
        directions = [("no grad", "forward")]
        directions += [(mode, way) for mode in MODES[family] for way in ("forward", "backward", "both")]
        size = "-".join(f"{key}{value}" for key, value in shape.items())
        for mode, way in directions:
            for variant in contestants(family, tiny=not ON_GPU):
                name = f"{family}-{size}-{mode}-{way}-{variant.name}"
                made.append(pytest.param(family, shape, mode, way, variant, id=name))
    return made


@pytest.fixture(autouse=True, scope="module")
def leave_nothing():
    yield
    Prepared.drop()


@pytest.mark.parametrize(("family", "shape", "mode_name", "way", "variant"), parameters())
def test_speed(benchmark: Any, family: str, shape: dict[str, int], mode_name: str, way: str, variant: Variant) -> None:
    prepared = Prepared.get(family, shape)
    problem = prepared.problem
    (mode,) = [mode for mode in problem.modes if mode.name == mode_name]
    try:
        run = Run(problem, variant, mode, prepared.function(variant))
    except Unavailable as reason:
        pytest.skip(str(reason))
    errors = run.errors()
    assert agrees(errors), f"errors as multiples of what is allowed: {errors}"
    benchmark.group = f"{family} {shape} {mode_name}, {way}"
    benchmark.pedantic(timed(run, way), setup=lambda: (set_up(run, way), {}), rounds=10, warmup_rounds=2)
    benchmark.extra_info.update(errors=errors, package=variant.version(), extra_bytes=peak_extra_bytes(run))
    if benchmark.stats is not None and (way == "both" or not mode.has_gradient):  # None with --benchmark-disable
        rate = mode.work / benchmark.stats.stats.median
        scale, unit = (1e9, "GB/s") if problem.unit == "bytes" else (1e12, "TFLOP/s")
        benchmark.extra_info.update({unit: rate / scale, "share_of_ceiling": rate / prepared.ceiling})


def set_up(run: Run, way: str) -> tuple[Any, ...]:
    leaves = run.leaves()
    arguments = (run.forward(leaves), leaves) if way == "backward" else (leaves,)
    synchronize()
    return arguments


def timed(run: Run, way: str) -> Any:
    def forward(leaves: Any) -> Any:
        output = run.forward(leaves)
        synchronize()
        return output

    def backward(output: Any, leaves: Any) -> Any:
        grads = run.backward(output, leaves)
        synchronize()
        return grads

    def both(leaves: Any) -> Any:
        return backward(run.forward(leaves), leaves)

    return {"forward": forward, "backward": backward, "both": both}[way]
