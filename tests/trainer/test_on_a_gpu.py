"""A short run of each trainer with its defaults, on a GPU where there is one: it waits for the device at logs alone.

The defaults are float32 weights, on a GPU under autocast to bfloat16. Without a GPU the same runs show that the tests
themselves are right: waiting is then no error, but what would make it one is called all the same.
"""

import math

import pytest
import torch
from reward_models import tiny_reward_model
from tiny import random_rows, tiny_model, word_tokenizer
from transformers import TrainerCallback

import fastdpo

pytest.importorskip("datasets")  # which a GPU machine may lack

ON_A_GPU = pytest.mark.gpu
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]
# Heads of 64 channels, two to a key: what the variable-length kernels take.
SHAPE = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}


def unpaired(rows):
    return [
        {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": number % 2 == 0}
        for number, row in enumerate(rows)
    ]


# The name of a trainer -> what makes its model, and its rows of pairs.
RUNS = {
    "DPO": (tiny_model, list),
    "KTO": (tiny_model, unpaired),
    "ORPO": (tiny_model, list),
    "CPO": (tiny_model, list),
    "Reward": (tiny_reward_model, list),
}


def trainer(name, device, tmp_path, **options):
    make, rows_of = RUNS[name]
    rows = random_rows(32) if device == "cpu" else random_rows(48, prompt=(1, 40), answer=(1, 30))
    steps = len(rows) // 8
    given = {"max_steps": steps, "logging_steps": steps // 2, "save_strategy": "no", "report_to": [],
             "disable_tqdm": True, "use_cpu": device == "cpu", "output_dir": str(tmp_path)}  # fmt: skip
    return getattr(fastdpo, f"{name}Trainer")(
        make(**SHAPE),
        args=getattr(fastdpo, f"{name}Config")(**given | options),
        train_dataset=rows_of(rows),
        processing_class=word_tokenizer(),
    )


class NoWaits(TrainerCallback):
    """Makes it an error to wait for the device, from the end of the first step on, but for the logs."""

    def __init__(self):
        self.modes = []

    def set(self, mode, step):
        torch.cuda.set_sync_debug_mode(mode)
        self.modes.append((step, mode))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % args.logging_steps == 0:
            self.set("default", state.global_step)
        elif state.global_step == 1:  # in which packing is verified
            self.set("error", 1)

    def on_log(self, args, state, control, **kwargs):
        if state.global_step < state.max_steps:
            self.set("error", state.global_step)


def train(run, device, monkeypatch):
    """The entries of its log; only between them may nothing wait."""
    torch.use_deterministic_algorithms(False)  # no default, and its kernels may wait
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    waits = NoWaits()
    run.add_callback(waits)
    try:
        run.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    last, half = run.args.max_steps, run.args.logging_steps
    assert waits.modes == [(1, "error"), (half, "default"), (half, "error"), (last, "default")]
    return [entry for entry in run.state.log_history if "loss" in entry]


# On a CPU one of each kind of model and rows.
CASES = [("DPO", "cpu"), ("KTO", "cpu"), ("Reward", "cpu"), *(pytest.param(n, "cuda", marks=ON_A_GPU) for n in RUNS)]


@pytest.mark.parametrize(("name", "device"), CASES)
def test_nothing_waits_between_logs(name, device, tmp_path, monkeypatch):
    run = trainer(name, device, tmp_path)
    before = [weight.detach().clone() for weight in run.model.parameters()]
    dtypes = set()
    run.model.base_model.layers[0].self_attn.q_proj.register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
    logs = train(run, device, monkeypatch)
    assert len(logs) == 2 and all(
        math.isfinite(value) for entry in logs for value in (entry["loss"], entry["grad_norm"])
    )
    after = list(run.model.parameters())
    assert all(
        weight.dtype == torch.float32 and weight.device == torch.zeros((), device=device).device for weight in after
    )
    assert any(not torch.equal(old.to(new.device), new) for old, new in zip(before, after, strict=True))
    assert dtypes == {torch.bfloat16 if device == "cuda" else torch.float32}


@pytest.mark.parametrize("device", DEVICES)
def test_a_cache_filled_on_the_device_and_a_run_from_it(device, tmp_path, monkeypatch, scored):
    cache = tmp_path / "cache"
    filling = trainer("DPO", device, tmp_path, ref_logps=str(cache))
    assert sum(scored) == 2 * len(filling.train_dataset) and list(cache.glob("shard-*.parquet"))
    scored.clear()
    logs = train(trainer("DPO", device, tmp_path, ref_logps=str(cache)), device, monkeypatch)
    assert not scored
    # The policy hardly moves at the default learning rate, so what is cached is its own log-probs.
    assert [entry["loss"] for entry in logs] == pytest.approx([math.log(2)] * 2, abs=0.02)
