"""Set-up of the trainers' tests."""

from types import SimpleNamespace

import pytest


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch):
    """Every run would time matrix products for its `perf/mfu`, and collect garbage: a second each."""
    import accelerate.utils.memory as memory

    import fastdpo.trainer.metrics

    monkeypatch.setattr(fastdpo.trainer.metrics, "gemm_flops_per_second", lambda *_: 1e12)
    monkeypatch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))
