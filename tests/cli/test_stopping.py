"""What is left where `fastdpo train` is told to stop, killed, or the disk is full; and how it goes on from there."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import processes
import pytest
import torch
from tiny import text_rows, tiny_model, write_rows

from fastdpo.cli import main

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_rows(40))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model_folder, pairs):
    """The output folder of a run of five steps."""
    folder = tmp_path_factory.mktemp("finished")
    words = ["train", "--model", model_folder, "--dataset", pairs, "--output_dir", str(folder / "out"),
             "--disable_tqdm", "true", "--learning_rate", "1e-3"]  # fmt: skip
    assert main(words) == 0
    (folder / "out" / "report.png").write_bytes(b"picture")
    return folder / "out"


@pytest.fixture
def words(tmp_path, model_folder, pairs):
    """A command line of five steps, which writes a checkpoint after each."""
    return ["train", "--model", model_folder, "--dataset", pairs, "--output_dir", str(tmp_path / "out"),
            "--disable_tqdm", "true", "--learning_rate", "1e-3"]  # fmt: skip


@pytest.fixture
def call(words, capfd):
    def run(*more):
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        code = main([*words, *more])
        assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        err = capfd.readouterr().err
        assert "Traceback" not in err
        return code, [line for line in err.splitlines() if line.startswith("fastdpo: ")]

    return run


def weights(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


def same_weights(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


# A moment of a run: the function that is called then, in which the signal arrives.
MOMENTS = {
    "while the references are computed": ("fastdpo.reference.fill", "fill_cache"),
    "while measuring before": ("fastdpo.evaluation", "measure_preference"),
    "in training": ("fastdpo.trainer.engine", "batch of PreferenceTrainer"),
    "when training ends": ("fastdpo.trainer.command_trainer", "when trained"),
    "while saving": ("fastdpo.saving", "drop_other_weights"),
    "while measuring after": ("fastdpo.evaluation", "measure_preference, 2"),
    "while writing the report": ("fastdpo.report", "write_report"),
}


def interrupt(monkeypatch, moment, number):
    """Sends the signal to this process the first time (or the second) that the moment comes."""
    from fastdpo.saving import drop_other_weights
    from fastdpo.trainer.command_trainer import CommandTrainer
    from fastdpo.trainer.engine import PreferenceTrainer

    counts = {"left": 2 if moment == "while measuring after" else 1}

    def sending(original):
        def wrapped(*args, **kwargs):
            counts["left"] -= 1
            if counts["left"] == 0:
                os.kill(os.getpid(), number)
            return original(*args, **kwargs)

        return wrapped

    if moment == "in training":
        monkeypatch.setattr(PreferenceTrainer, "training_step", sending(PreferenceTrainer.training_step))
    elif moment == "when training ends":
        original = CommandTrainer.save_whole
        monkeypatch.setattr(CommandTrainer, "save_whole", sending(original))
    elif moment == "while saving":
        monkeypatch.setattr("fastdpo.trainer.command_trainer.drop_other_weights", sending(drop_other_weights))
    elif moment == "while the references are computed":
        monkeypatch.setattr(CommandTrainer, "_with_reference", sending(CommandTrainer._with_reference))
    else:
        module, name = MOMENTS[moment]
        place = f"{module}.{name.split(',')[0]}"
        monkeypatch.setattr(place, sending(getattr(sys.modules[module], name.split(",")[0])))


QUICK = ("in training", "when training ends")
NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.mark.parametrize(
    "moment, number",
    [
        *((moment, number) for moment in QUICK for number in NUMBERS),
        *(
            pytest.param(moment, NUMBERS[place % 2], marks=pytest.mark.slow)
            for place, moment in enumerate(MOMENTS)
            if moment not in QUICK
        ),
    ],
)
def test_a_signal_at_any_moment(call, words, tmp_path, monkeypatch, finished, moment, number):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupt(patch, moment, number)
        code, said = call()
    assert code == 128 + number
    assert len(said) == 1 and said[0].startswith("fastdpo: interrupted ")
    if moment in ("while the references are computed", "while measuring before"):
        assert "before training; give the same command again" in said[0] and not list(out.iterdir())
        assert call()[0] == 0
    elif moment == "in training":
        checkpoint = str(out / "checkpoint-1")
        assert f"with {checkpoint} as the newest checkpoint; go on with: fastdpo train " in said[0]
        assert not (out / "model.safetensors").exists()
        command = shlex.split(said[0].partition("go on with: fastdpo ")[2])
        assert command == [*words, "--resume_from_checkpoint", "true"]
        assert main(command) == 0
    else:
        assert f"the trained model is in {out}" in said[0] and not (out / "summary.json").exists()
        assert not (out / ".saving").exists()
    # In all cases what is there in the end is the model of an undisturbed run.
    assert same_weights(weights(out), weights(finished))


def train_until_killed(words, folder):
    """`fastdpo train`, killed in its third step."""
    from fastdpo.trainer.engine import PreferenceTrainer

    original, steps = PreferenceTrainer.training_step, []

    def step(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    PreferenceTrainer.training_step = step
    sys.exit(main(words))


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path, words, call, finished):
    processes.Worker(tmp_path, train_until_killed, words, tmp_path).end(-signal.SIGKILL)
    assert sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    code, said = call()
    assert code == 2 and "holds checkpoints (checkpoint-2) already" in said[0]
    assert call("--resume_from_checkpoint", "true") == (0, [])
    assert json.loads((tmp_path / "out" / "checkpoint-5" / "trainer_state.json").read_text())["global_step"] == 5
    assert same_weights(weights(tmp_path / "out"), weights(finished))


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk(call, tmp_path, monkeypatch):
    """While the trained model is saved over another run's: what was there stays, and the checkpoint is named."""
    out = tmp_path / "out"
    tiny_model(seed=5).save_pretrained(out)
    before = weights(out)
    with monkeypatch.context() as patch:
        patch.setattr("fastdpo.trainer.command_trainer.CommandTrainer.save_model", _only_into("checkpoint-"))
        code, said = call("--overwrite", "true")
    assert code == 2 and len(said) == 1
    assert "the trained model could not be saved (No space left on device)" in said[0]
    assert f"{out / 'checkpoint-5'} as the newest checkpoint" in said[0] and "--overwrite" not in said[0]
    assert same_weights(weights(out), before) and not (out / ".saving").exists()
    assert call("--resume_from_checkpoint", "true")[0] == 0
    assert not same_weights(weights(out), before)


def _only_into(name):
    from fastdpo.trainer.command_trainer import CommandTrainer

    original = CommandTrainer.save_model

    def save(self, output_dir=None, _internal_call=False):
        if name not in str(output_dir):
            Path(output_dir, "model.safetensors").write_bytes(b"half")
            full()
        original(self, output_dir, _internal_call)

    return save


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file")]
)
def test_a_disk_that_is_full_at_a_checkpoint(call, tmp_path, monkeypatch, error):
    from transformers import Trainer

    def save(self, folder):
        if "checkpoint-3" in folder:
            raise error
        original(self, folder)

    original = Trainer._save_optimizer_and_scheduler
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", save)
        code, said = call()
    assert code == 2 and len(said) == 1 and "checkpoint-3: the checkpoint could not be written" in said[0]
    assert "checkpoint-2 as the newest checkpoint; go on with: " in said[0]
    assert not (tmp_path / "out" / "checkpoint-3").exists()
    assert call("--resume_from_checkpoint", "true") == (0, [])


def test_a_full_disk_when_the_report_is_written(call, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.report.write_report", full)
    code, said = call("--max_steps", "1")
    assert code == 2 and "the trained model is saved in" in said[0] and "No space left" in said[0]
    assert weights(tmp_path / "out")


@pytest.fixture
def resumable(finished, tmp_path):
    """A copy of it, in which checkpoint-4 is the newest."""
    shutil.copytree(finished, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-5")
    return tmp_path / "out" / "checkpoint-4"


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
         "fastdpo_state.json", "config.json")  # fmt: skip


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_garbage(path):
    path.write_bytes(bytes(range(256)) * 8)


def empty_object(path):
    path.write_text("{}")


DAMAGES = [
    (name, damage)
    for name in FILES
    for damage in (Path.unlink, truncate, fill_with_garbage, empty_object)
    # Resuming reads nothing from config.json; what reads tensors takes {} for garbage, whichever it reads.
    if not (name == "config.json" and damage in (Path.unlink, empty_object))
    and not (name in ("optimizer.pt", "scheduler.pt") and damage is empty_object)
]


@pytest.mark.parametrize("name, damage", [
    pytest.param(name, damage, marks=pytest.mark.slow if damage in (fill_with_garbage, empty_object) else ())
    for name, damage in DAMAGES
])  # fmt: skip
def test_a_damaged_checkpoint(call, resumable, name, damage):
    damage(resumable / name)
    code, said = call("--resume_from_checkpoint", str(resumable))
    assert code == 2 and len(said) == 1, said
    assert str(resumable) in said[0] and "checkpoint" in said[0]


def test_true_passes_over_a_checkpoint_that_was_cut_short(call, tmp_path, finished):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "checkpoint-5" / "trainer_state.json").unlink()
    assert call("--resume_from_checkpoint", "true") == (0, [])


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (("--seed", "7"), "seed 42 there, 7 here"),
        (("--loss_type", "ipo"), "loss_type ['sigmoid'] there, ['ipo'] here"),
        (("--beta", "0.5"), "beta 0.1 there, 0.5 here"),
        (("--per_device_train_batch_size", "4"), "batch_size 8 there, 4 here"),
        (("--learning_rate", "1e-4"), "given twice"),
        (("--weight_decay", "0.1"), "weight_decay 0.0 there, 0.1 here"),
        (("--max_length", "20"), "max_length 1024 there, 20 here"),
    ],
)
def test_a_checkpoint_of_another_run(call, resumable, more, what):
    code, said = call("--resume_from_checkpoint", "true", *more)
    assert code == 2 and len(said) == 1 and what in said[0]


def test_a_checkpoint_of_other_data(resumable, words, tmp_path, capfd):
    rows = text_rows(40)
    rows[3] = rows[3] | {"chosen": " hello"}
    words[words.index("--dataset") + 1] = write_rows(tmp_path / "other.jsonl", rows)
    assert main([*words, "--resume_from_checkpoint", "true"]) == 2
    assert "is of another run: other training rows (36 there, 36 here)" in capfd.readouterr().err


def test_where_there_is_nothing_to_go_on_from(call, tmp_path):
    for given, what in (("true", "no whole checkpoint"), ("/nowhere", "no such checkpoint folder"),
                        (str(tmp_path), "no whole checkpoint")):  # fmt: skip
        code, said = call("--resume_from_checkpoint", given)
        assert code == 2 and len(said) == 1 and what in said[0]
    assert call("--resume_from_checkpoint", "false", "--max_steps", "1") == (0, [])


def test_a_finished_run_is_measured_again(call, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "summary.json").unlink()
    assert call("--resume_from_checkpoint", "true") == (0, [])
    assert same_weights(weights(tmp_path / "out"), weights(finished))
    summary, first = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "out", finished))
    assert {name: summary[name] for name in first if name.startswith("held")} == {
        name: first[name] for name in first if name.startswith("held")
    }


def test_from_python_it_is_said(tmp_path, caplog):
    """In a script of one's own, which may know what it does."""
    from trainer_runs import trainer

    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "out" / "checkpoint-1"
    (checkpoint / "scheduler.pt").unlink()
    trainer(tmp_path, max_steps=2, seed=3, beta=0.3).train(resume_from_checkpoint=str(checkpoint))
    assert re.search(r"checkpoint-1 holds no scheduler.pt: what they kept begins anew", caplog.text)
    assert "is of another run: " in caplog.text
    assert "seed 42 there, 3 here" in caplog.text and "beta 0.1 there, 0.3 here" in caplog.text
    caplog.clear()
    trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert "another run" not in caplog.text and "begins anew" not in caplog.text
