"""The speed of a matrix product, which `perf/mfu` is a share of: when it is measured, and what becomes of a failure."""

import logging

import pytest
import torch
from tiny import random_rows
from trainer_runs import trainer
from transformers import TrainerCallback

import fastdpo.trainer.metrics as metrics
from fastdpo.report import speed_summary


class Events(TrainerCallback):
    """What happened, in its order."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, *args, **kwargs):
        self.seen.append("step")

    def on_log(self, *args, **kwargs):
        self.seen.append("log")

    def measured(self, device, dtype):
        self.seen.append(dtype)
        return 1e12


def run_of(tmp_path, monkeypatch, measure=None, **options):
    events = Events()
    monkeypatch.setattr(metrics, "gemm_flops_per_second", measure or events.measured)
    run = trainer(tmp_path, rows=random_rows(8), **{"max_steps": 2, "gradient_checkpointing": False, **options})
    run.add_callback(events)
    run.train()
    return run, events


def test_it_is_measured_before_the_first_step_and_once_a_run(tmp_path, monkeypatch):
    run, events = run_of(tmp_path, monkeypatch)
    assert events.seen == [torch.float32, "step", "log", "step", "log", "log"]
    run.train()
    assert events.seen.count(torch.float32) == 1
    assert all("perf/mfu" in entry for entry in run.state.log_history if "loss" in entry)


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({"logging_strategy": "no"}, 0),
        ({"logging_steps": 3}, 0),
        ({"logging_steps": 3, "logging_first_step": True}, 1),
        ({"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 1}, 1),
        ({"logging_steps": 0.5}, 1),
    ],
)
def test_only_a_run_that_logs_measures(tmp_path, monkeypatch, options, measured):
    run, events = run_of(tmp_path, monkeypatch, **options)
    assert events.seen.count(torch.float32) == measured
    assert any("perf/mfu" in entry for entry in run.state.log_history) == bool(measured)


def test_without_memory_for_it_the_run_goes_on_without_mfu(tmp_path, monkeypatch, caplog):
    def measure(device, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 128.00 MiB.")

    with caplog.at_level(logging.WARNING, metrics.__name__):
        run, events = run_of(tmp_path, monkeypatch, measure)
        run.train()
    assert events.seen.count("step") == 4
    assert sum("perf/mfu is not logged" in record.message for record in caplog.records) == 1
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert all("perf/mfu" not in entry and entry["perf/tokens_per_second"] > 0 for entry in logged)
    assert set(speed_summary(run.state.log_history)) == {
        "tokens_per_second", "pairs_per_second", "saved_tokens_fraction", "peak_memory_gb"
    }  # fmt: skip


def test_another_fault_is_told(tmp_path, monkeypatch):
    def measure(device, dtype):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_of(tmp_path, monkeypatch, measure)
