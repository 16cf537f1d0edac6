"""Set-up of the commands' tests."""

from types import SimpleNamespace

import pytest


@pytest.fixture
def quick_runs(monkeypatch):
    """Whole runs without what takes a second each: the picture, answers, timed matrix products, garbage collection."""
    import accelerate.utils.memory as memory

    import fastdpo.evaluation
    import fastdpo.report
    import fastdpo.trainer.metrics

    monkeypatch.setattr(fastdpo.trainer.metrics, "gemm_flops_per_second", lambda *_: 1e12)
    monkeypatch.setattr(memory, "gc", SimpleNamespace(collect=lambda: 0))
    monkeypatch.setattr(fastdpo.report, "write_report", lambda path, *_, **__: path.write_bytes(b"picture"))
    monkeypatch.setattr(fastdpo.evaluation, "generate", lambda model, tokenizer, prompts, **_: ["yes" for _ in prompts])
