"""A process is killed after a checkpoint; the run that goes on from it ends as the undisturbed one, to the bit."""

import copy
import importlib
import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
from datasets import IterableDataset
from tiny import random_rows, tiny_model
from trainer_runs import trainer

sys.path.insert(0, str(Path(__file__).parent))
interrupted_run = importlib.import_module("interrupted_run")
start, history = interrupted_run.start, interrupted_run.history

RUNS = {
    "plain": {},
    "no log yet": {"logging_steps": 100},
    "logs between checkpoints": {"logging_steps": 4, "save_steps": 3},
    "accumulated, last step short": {"gradient_accumulation_steps": 3, "logging_steps": 4, "rows": 19},
    "cut and accumulated": {"max_tokens_per_microbatch": 60, "gradient_accumulation_steps": 2, "logging_steps": 4},
    "by prompts": {"train_sampling_strategy": "group_by_prompt", "alike": True, "logging_steps": 4},
    "by length": {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 2},
    "balanced": {"train_sampling_strategy": "batch_rebalance", "logging_steps": 4},
    "dropout": {"disable_dropout": False, "model": {"kind": "gpt2", "resid_pdrop": 0.3, "attn_pdrop": 0.2}},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 2, "logging_steps": 4},
    "lora dropout": {"lora": True, "lora_dropout": 0.3, "disable_dropout": False, "logging_steps": 4},
    "cache": {"precompute_ref_log_probs": True, "logging_steps": 4},
    "kto": {"trainer": "kto", "logging_steps": 4},
    "kto, random": {"trainer": "kto", "logging_steps": 4, "train_sampling_strategy": "random"},
    "streamed": {"streamed": True, "rows": 40, "logging_steps": 4},
    "epoch border": {"rows": 12, "logging_steps": 4, "save_steps": 3},
    "before an epoch border": {"rows": 16, "logging_steps": 5, "save_steps": 3, "max_steps": 9},
    "epochs": {"rows": 12, "logging_steps": 4, "num_train_epochs": 2, "max_steps": -1},
    "skipping": {"nan_loss": "skip", "logging_steps": 4},
    "mix": {"loss_type": ["sigmoid", "sft"], "lr_scheduler_type": "cosine", "logging_steps": 4},
}  # fmt: skip
QUICK = (
    "no log yet",
    "cut and accumulated",
    "dropout",
    "moving reference",
    "lora dropout",
    "kto",
    "streamed",
    "epochs",
)
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RUNS]


def killed(folder, after, **options):
    """A run whose process is killed as soon as the checkpoint of that step is written."""
    run = start(folder, pause_in="on_save", pause_step=after, **options)
    run.paused()
    run.send(signal.SIGKILL)
    assert run.code() == -signal.SIGKILL
    assert (Path(folder) / "out" / f"checkpoint-{after}" / "trainer_state.json").exists()


def assert_same(one, other):
    for ours, theirs in zip(one["history"], other["history"], strict=True):
        assert ours == theirs
    assert one["weights"] == other["weights"] and one["steps"] == other["steps"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The undisturbed run, logged at each step."""
    return start(tmp_path_factory.mktemp("plain"), logging_steps=1).result()


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path, name):
    """What a kill leaves is the same for all: but for the quick ones, the checkpoint is that of the whole run."""
    options = {"logging_steps": 1, **RUNS[name]}
    saving = {"save_strategy": "steps", "save_steps": options.pop("save_steps", 3)}
    if name in QUICK:
        whole = start(tmp_path / "whole", **options).result()
        killed(tmp_path / "run", 3, **saving, **options)
    else:
        whole = start(tmp_path / "run", **saving, **options).result()
        for path in (tmp_path / "run" / "out").glob("checkpoint-*"):
            if path.name != "checkpoint-3":
                shutil.rmtree(path)
    resumed = start(tmp_path / "run", resume=True, **options).result()
    assert whole["steps"] > 3
    assert_same(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [pytest.param(False, marks=pytest.mark.slow), True])
def test_measuring_the_machine_draws_nothing_from_the_runs_random_numbers(tmp_path, dropout):
    """perf/mfu times a matrix product before the first step of this process, whether it was resumed or not."""
    options = {"real_gemm": True, "disable_dropout": not dropout, "model": {"attention_dropout": 0.3}}
    whole = start(tmp_path / "whole", **options).result()
    killed(tmp_path / "run", 3, save_strategy="steps", save_steps=3, **options)
    assert_same(start(tmp_path / "run", resume=True, **options).result(), whole)


@pytest.mark.slow
def test_a_run_killed_twice(tmp_path):
    """The second time before the first log that the resumed process would have made."""
    options = {"logging_steps": 5, "sync_ref_model": True, "ref_model_sync_steps": 1}
    whole = start(tmp_path / "whole", **options).result()
    killed(tmp_path / "run", 2, save_strategy="steps", save_steps=2, **options)
    killed(tmp_path / "run", 4, save_strategy="steps", save_steps=2, resume=True, **options)
    assert_same(start(tmp_path / "run", resume=True, **options).result(), whole)


@pytest.mark.slow
def test_two_processes_killed_go_on(tmp_path):
    """Their sums are added up in another order, so the metrics that were cut in two agree to rounding."""
    options = {"processes": 2, "logging_steps": 4, "per_device_train_batch_size": 2}
    undisturbed = start(tmp_path / "whole", **options)
    whole = [undisturbed.result(rank) for rank in (0, 1)]
    run = start(tmp_path / "run", pause_in="on_save", pause_step=3, save_strategy="steps", save_steps=3, **options)
    for rank in (0, 1):
        run.paused(rank)
    for rank in (0, 1):
        run.send(signal.SIGKILL, rank)
    assert [run.code(rank) for rank in (0, 1)] == [-signal.SIGKILL] * 2
    resumed = start(tmp_path / "run", resume=True, **options)
    again = [resumed.result(rank) for rank in (0, 1)]
    assert len({each["weights"] for each in again + whole}) == 1
    for ours, theirs in zip(again[0]["history"], whole[0]["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)


@pytest.mark.slow
def test_two_processes_count_the_tokens_of_both(tmp_path, plain):
    one = plain["history"]
    two = start(tmp_path / "two", processes=2, per_device_train_batch_size=2)
    for rank in (0, 1):
        logged = [entry.get("num_tokens") for entry in two.result(rank)["history"]]
        assert logged == [entry.get("num_tokens") for entry in one]


@pytest.mark.slow
def test_a_checkpoint_of_another_program_resumes(tmp_path, plain):
    """Without fastdpo_state.json the first means begin at the checkpoint, and are means of what they say."""
    options = {"logging_steps": 1}
    killed(tmp_path / "run", 3, save_strategy="steps", save_steps=3, **options)
    (tmp_path / "run" / "out" / "checkpoint-3" / "fastdpo_state.json").unlink()
    resumed = start(tmp_path / "run", resume=True, **options).result()
    assert resumed["weights"] == plain["weights"]
    for ours, theirs in zip(resumed["history"], plain["history"], strict=True):
        assert {**ours, "num_tokens": 0} == {**theirs, "num_tokens": 0}


@pytest.mark.slow
def test_means_of_a_foreign_checkpoint_between_two_logs(tmp_path, plain):
    """Of the steps since the checkpoint."""
    options = {"logging_steps": 5}
    each = plain["history"]
    killed(tmp_path / "run", 3, save_strategy="steps", save_steps=3, **options)
    (tmp_path / "run" / "out" / "checkpoint-3" / "fastdpo_state.json").unlink()
    logs = start(tmp_path / "run", resume=True, **options).result()["history"][0]
    assert logs["step"] == 5
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert logs[name] == pytest.approx((each[3][name] + each[4][name]) / 2, rel=1e-5), name


def test_a_moving_reference_is_not_made_up(tmp_path):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 2}
    killed(tmp_path, 3, save_strategy="steps", save_steps=3, **options)
    (tmp_path / "out" / "checkpoint-3" / "reference.safetensors").unlink()
    run = start(tmp_path, resume=True, **options)
    assert run.code() == 1
    assert "holds no reference.safetensors, and sync_ref_model=True has moved the reference" in run.said()


@pytest.mark.slow
def test_the_mean_loss_of_a_resumed_call_is_that_of_its_own_steps(tmp_path, plain):
    """train() returns the mean over the steps that it has run; what was logged before is none of them."""
    each = [entry["loss"] for entry in plain["history"] if "loss" in entry]
    options = {"logging_steps": 5}
    killed(tmp_path / "run", 3, save_strategy="steps", save_steps=3, **options)
    resumed = start(tmp_path / "run", resume=True, **options).result()
    assert resumed["train_loss"] == pytest.approx(sum(each[3:]) / 3, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["trainer_state.json", "model.safetensors"])
def test_a_checkpoint_that_was_broken_off_is_not_resumed_from(tmp_path, plain, broken):
    """Killed while it wrote a checkpoint, a run goes on from the one before (resume_from_checkpoint=True)."""
    killed(tmp_path / "run", 4, save_strategy="steps", save_steps=2)
    order = ["fastdpo_state.json", "config.json", "model.safetensors", "optimizer.pt", "trainer_state.json"]
    for name in order[order.index(broken) :]:
        (tmp_path / "run" / "out" / "checkpoint-4" / name).unlink()
    assert_same(start(tmp_path / "run", resume=True).result(), plain)


# In this process


def saved_run(tmp_path, **options):
    """A run of 6 steps with a checkpoint after the 3rd, in which logs stand every 4 steps."""
    run = trainer(tmp_path, save_strategy="steps", save_steps=3, **({"logging_steps": 4, "max_steps": 6} | options))
    run.train()
    return run


def test_what_a_checkpoint_holds(tmp_path):
    run = saved_run(tmp_path, sync_ref_model=True, ref_model_sync_steps=2)
    first, last = (tmp_path / "out" / f"checkpoint-{step}" for step in (3, 6))
    state = json.loads((first / "fastdpo_state.json").read_text())
    assert state["last_logged"] == 0 and state["loss_since_log"] > 0
    assert state["metrics"]["names"][:2] == ["rewards/chosen", "rewards/rejected"]
    assert state["metrics"]["counts"] == [12.0] * len(state["metrics"]["names"])
    assert json.loads((last / "fastdpo_state.json").read_text())["last_logged"] == 4
    assert (first / "reference.safetensors").stat().st_size > 0
    assert run.state.log_history[0]["step"] == 4


def test_a_trainer_that_trains_again_begins_its_means_anew(tmp_path):
    """Two calls of train(): the second one's first means hold nothing of what the first call left unlogged."""
    run = trainer(tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0, train_sampling_strategy="sequential")
    run.train()
    first = run.state.log_history[0]
    run.train()
    again = run.state.log_history[0]
    for name in ("loss", "logps/chosen", "logps/rejected", "entropy"):
        assert again[name] == pytest.approx(first[name], rel=1e-6), name


def test_a_trainer_that_resumes_in_its_own_process(tmp_path):
    """As in a notebook: the same object goes back to a checkpoint, and its curve is that of the first time."""
    run = saved_run(tmp_path)
    whole, weights = history(run.state.log_history), copy.deepcopy(run.model.state_dict())
    run.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert history(run.state.log_history) == whole
    for name, value in run.model.state_dict().items():
        assert value.equal(weights[name]), name


def test_a_checkpoint_right_after_a_log_brings_no_old_sums_back(tmp_path):
    """Its sums are empty: so must be the trainer's, whatever it has summed up since."""
    run = saved_run(tmp_path, logging_steps=3, max_steps=5)
    run.args.max_steps = 6
    run.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    fresh = trainer(tmp_path / "fresh", max_steps=6, logging_steps=3)
    fresh.train()
    logs = [[entry for entry in history(each.state.log_history) if "loss" in entry] for each in (run, fresh)]
    assert [entry["step"] for entry in logs[0]] == [3, 6]
    assert logs[0] == logs[1]


def test_a_stream_is_not_resumed_in_its_second_pass(tmp_path):
    """Where transformers would skip through the first pass alone, and go on with other rows."""

    def run(steps):
        streamed = IterableDataset.from_generator(lambda: iter(random_rows(8, seed=3)))
        return trainer(tmp_path, rows=streamed, max_steps=steps, save_strategy="steps", save_steps=1)

    run(3).train()  # two steps a pass
    for step, refused in ((1, False), (2, False), (3, True)):
        checkpoint = str(tmp_path / "out" / f"checkpoint-{step}")
        if refused:
            with pytest.raises(ValueError, match="stands in pass 2 over a streamed data set"):
                run(4).train(resume_from_checkpoint=checkpoint)
        else:
            run(2 if step == 1 else 3).train(resume_from_checkpoint=checkpoint)


@pytest.mark.slow
def test_evaluations_between_do_not_disturb(tmp_path):
    evaluated = tiny_model()
    run = trainer(tmp_path, evaluated, max_steps=6, logging_steps=4, eval_strategy="steps", eval_steps=1,
                  eval_dataset=random_rows(6, seed=9))  # fmt: skip
    run.train()
    plain = trainer(tmp_path, tiny_model(), max_steps=6, logging_steps=4)
    plain.train()
    logs = [history([entry for entry in each.state.log_history if "loss" in entry]) for each in (run, plain)]
    assert logs[0] == logs[1]
