"""The bytes of logits that a run holds at a time: chosen once, the same for all processes, and resumed with."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from trainer_runs import trainer

from fastdpo import models
from fastdpo.trainer import head_memory
from fastdpo.trainer.passes import HostCounts
from fastdpo.trainer.resuming import STATE

GPU = torch.device("cuda", 0)
V = 100_000


class Others(HostCounts):
    """Another process that answers `values` beside this one."""

    def __init__(self, *values):
        super().__init__()
        self.values = values

    def gather(self, values):
        assert len(values) == len(self.values)
        return [list(values), list(self.values)]


def run_on_a_gpu(*others, memory_budget=None):
    """What the functions read of a trainer on a GPU; its model has no weights to speak of."""
    embeddings = torch.nn.Embedding(V, 1, device="meta")
    inner = SimpleNamespace(dtype=torch.bfloat16, get_input_embeddings=lambda: embeddings)
    return SimpleNamespace(
        args=SimpleNamespace(device=GPU, memory_budget=memory_budget), model=torch.nn.Linear(1, 1), optimizer=None,
        memory_budget=memory_budget, _inner=lambda _: inner, _autocast_dtype=None,
        _host_counts=Others(*others) if others else HostCounts(),
    )  # fmt: skip


def test_all_processes_take_the_least(monkeypatch):
    monkeypatch.setattr(head_memory, "free_memory", lambda device: (80 << 30) + 48)  # 6 numbers are still to come
    assert head_memory.choose_budget(run_on_a_gpu()) == pytest.approx(10 << 30, abs=8)
    assert head_memory.choose_budget(run_on_a_gpu(3 << 30)) == 3 << 30


def test_what_is_still_to_come_is_not_free():
    model = torch.nn.Sequential(torch.nn.Linear(10, 10), torch.nn.Linear(10, 10).bfloat16().requires_grad_(False))
    size = 110 * 4
    assert head_memory.memory_to_come(model, None) == 3 * size  # gradients, and AdamW's two numbers for each
    optimizer = torch.optim.AdamW(model[0].parameters())
    model[0](torch.ones(10)).sum().backward()
    assert head_memory.memory_to_come(model, optimizer) == 2 * size
    optimizer.step()
    assert head_memory.memory_to_come(model, optimizer) == 0


@pytest.mark.parametrize(
    "before, others, kept",
    [
        (1 << 30, (), 1 << 30),
        (6 << 30, (), None),  # more than half of what is free
        (1 << 30, (1 << 30, 1), 1 << 30),
        (1 << 30, (1 << 30, 0), None),  # does not fit on another process
        (1 << 30, (2 << 30, 1), None),  # another process reads another checkpoint
        (None, (), None),
    ],
)
def test_a_resumed_run_takes_the_budget_that_fits(tmp_path, monkeypatch, caplog, before, others, kept):
    monkeypatch.setattr(head_memory, "free_memory", lambda device: 8 << 30)
    (tmp_path / STATE).write_text(json.dumps({} if before is None else {"memory_budget": before}))
    run = run_on_a_gpu(*others)
    head_memory.resume_budget(run, tmp_path)
    assert run.memory_budget == kept
    warned = [record.message for record in caplog.records if "rounded otherwise" in record.message]
    assert bool(warned) == (kept is None and before is not None and others[:1] != (2 << 30,))
    named = run_on_a_gpu(*others, memory_budget=17)
    head_memory.resume_budget(named, tmp_path)
    assert named.memory_budget == 17


def test_of_a_run(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(
        "fastdpo.trainer.engine.choose_budget",
        lambda trainer: chosen.append(head_memory.choose_budget(trainer)) or chosen[-1],
    )
    first = trainer(tmp_path, model=tiny_model(), save_strategy="steps", save_steps=2, max_steps=2)
    assert first.memory_budget is None
    first.train()
    assert first.memory_budget == 1 << 26 and chosen == [1 << 26]
    state = tmp_path / "out" / "checkpoint-2" / STATE
    assert json.loads(state.read_text())["memory_budget"] == 1 << 26
    state.write_text(json.dumps(json.loads(state.read_text()) | {"memory_budget": 12345}))
    seen = []
    resumed = trainer(tmp_path, model=tiny_model(), max_steps=3)
    for name in ("linear_loss", "linear_token_logps"):
        monkeypatch.setattr(models, name, spied(getattr(models, name), seen))
    resumed.train(resume_from_checkpoint=str(state.parent))
    # The reference's pass and the policy's; what verifies a model has no run yet.
    assert [budget for budget in seen if budget is not None] == [12345, 12345]
    assert len(chosen) == 1


def spied(function, seen):
    def spy(*args, memory_budget=None, **kwargs):
        seen.append(memory_budget)
        return function(*args, memory_budget=memory_budget, **kwargs)

    return spy
