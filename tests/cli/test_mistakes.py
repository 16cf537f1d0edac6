"""Mistakes in every command: one sentence on stderr, exit code 2, no traceback; what is our own fault says so."""

import errno

import pytest
import torch
from tiny import random_rows, text_rows, write_rows

from fastdpo.cli import main

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def fails(tmp_path, model_folder, capfd):
    """Runs a command that must fail; the one line that it says."""

    def run(*words, code=2):
        assert main(list(words)) == code
        err = capfd.readouterr().err
        assert "Traceback" not in err
        lines = [line for line in err.splitlines() if line.startswith("fastdpo: ")]
        assert len(lines) == 1, err
        return lines[0]

    return run


@pytest.fixture
def train(tmp_path, model_folder):
    """A good command line of `fastdpo train`."""
    return ["train", "--model", model_folder, "--dataset", write_rows(tmp_path / "pairs.jsonl", text_rows(12)),
            "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]  # fmt: skip


# Options with values that each must be refused, and what is said of them.
NUMBERS = {
    "learning_rate": ("nan", "inf", "-inf", "-1", "0", "fast"),
    "num_train_epochs": ("nan", "inf", "-3", "0"),
    "max_steps": ("0", "-3", "1.5"),
    "per_device_train_batch_size": ("0", "-1", "nan"),
    "per_device_eval_batch_size": ("0",),
    "gradient_accumulation_steps": ("0", "-2"),
    "seed": ("-1", "4294967296", "1.5"),
    "data_seed": ("-1", "4294967296"),
    "beta": ("nan", "inf"),
    "max_length": ("0", "1", "-5", "all"),
    "warmup_steps": ("-1", "nan"),
    "weight_decay": ("-1", "nan"),
    "adam_beta1": ("1", "-0.1", "nan"),
    "adam_beta2": ("2",),
    "adam_epsilon": ("-1e-8", "inf"),
    "max_grad_norm": ("-1", "nan"),
    "logging_steps": ("0", "-1", "nan", "1.5"),
    "save_steps": ("0", "-1", "inf", "2.5"),
    "eval_steps": ("0", "-1", "nan"),
    "save_total_limit": ("0", "-1"),
    "dataloader_num_workers": ("-1",),
    "dataloader_prefetch_factor": ("0",),
    "label_smoothing": ("nan", "-1", "0.9"),
    "max_tokens_per_microbatch": ("0", "-1"),
    "memory_budget": ("0",),
    "show_generations": ("-1",),
    "neftune_noise_alpha": ("-1", "nan"),
    "precompute_ref_batch_size": ("0",),
    "loss_weights": ("nan",),
    "eval_accumulation_steps": ("0",),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(fails, train, tmp_path, name):
    for value in NUMBERS[name]:
        said = fails(*train, f"--{name}={value}")
        assert (name in said and value.removesuffix(".0") in said) or "finite" in said or "must" in said, said
    assert not (tmp_path / "out").exists()  # before anything was loaded or made


OPTIONS = [
    (("--lerning_rate", "1"), "did you mean --learning_rate?"),
    (("--dataset", "other.jsonl"), "--dataset is given twice"),
    (("--label_smoothing", "0.1", "--label-smoothing", "0.2"), "is given twice"),
    (("stray",), "does not know stray"),
    (("--loss_type", "simgoid"), "Did you mean 'sigmoid'"),
    (("--loss_type", "kto"), "is a loss of answers"),
    (("--loss_options", "simpo_gamma=1"), "it must be a JSON object"),
    (("--loss_options", '{"simpo_gamma": 1.0}'), "simpo_gamma"),
    (("--save_strategy", "sometimes"), "sometimes"),
    (("--report_to", "no_such_tracker"), "no_such_tracker is not supported"),
    (("--lr_scheduler_type", "triangular"), "triangular"),
    (("--lr_scheduler_kwargs", "{"), "fastdpo: "),
    (("--deepspeed", "/nowhere/ds.json"), "fastdpo: "),
    (("--fsdp", "full_shard"), "--fsdp shards a model over several processes"),
    (("--fp16", "true", "--bf16", "true"), "bf16"),
    (("--push_to_hub", "true"), "needs a login to the hub"),
    (("--optim", "no_such_optimizer"), "no_such_optimizer"),
    (("--accelerator_config", "{"), "fastdpo: "),
    (("--model_init_kwargs", "{}"), "fastdpo: "),
    (("--dtype", "int8"), "--dtype"),
    (("--packing", "dense"), "--packing"),
    (("--split", "test"), "has no splits"),
    (("--overwrite", "maybe"), "neither true nor false"),
    (("--overwrite", "true", "--resume_from_checkpoint", "true"), "contradict each other"),
    (("--load_best_model_at_end", "true"), "fastdpo: "),
    (("--nan_loss", "ignore"), "nan_loss"),
    (("--model", "again"), "--model is given twice"),
]


@pytest.mark.parametrize(("more", "what"), OPTIONS, ids=[" ".join(more) for more, _ in OPTIONS])
def test_options(fails, train, tmp_path, monkeypatch, more, what):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    if more[0] == "--model_init_kwargs":
        more = ("--model_init_kwargs", '{"dtype": "bfloat16"}')
    assert what in fails(*train, *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["wandb", "tensorboard", "comet_ml", "mlflow", "trackio", "swanlab"])
def test_trackers_that_are_not_installed(fails, train, monkeypatch, package):
    from transformers.integrations import integration_utils

    class Missing:
        def __init__(self):
            raise RuntimeError(f"needs {package} to be installed. Run `pip install {package}`.")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, package, Missing)
    assert f"--report_to {package}: needs {package} to be installed" in fails(*train, "--report_to", package)


def test_liger_without_its_package(fails, train, monkeypatch):
    monkeypatch.setattr("transformers.utils.is_liger_kernel_available", lambda: False)
    assert "liger-kernel" in fails(*train, "--use_liger_kernel", "true")


def test_evaluation_in_training(fails, train, tmp_path):
    few = write_rows(tmp_path / "few.jsonl", text_rows(3))
    words = [few if word.endswith("pairs.jsonl") else word for word in train]
    assert "needs held-out pairs" in fails(*words, "--eval_strategy", "epoch")
    epochs = [*train, "--eval_strategy", "epoch", "--max_steps", "1"]
    assert main(epochs) == 0
    best = ("--load_best_model_at_end", "true", "--overwrite", "true")
    assert "metric_for_best_model" in fails(*epochs, *best, "--metric_for_best_model", "charm")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--frobnicate"], "does not know --frobnicate"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["train"], "required"),
        (["train", "--model"], "--model: expected one argument"),
        (["precompute"], "required"),
        (["precompute", "--model", "x", "--dataset", "y", "--shard", "0/3"], "--shard"),
        (["precompute", "--model", "x", "--model", "y", "--dataset", "z"], "--model is given twice"),
        (["demo", "--colour", "red"], "does not know --colour"),
        (["cache"], "COMMAND"),
        (["cache", "verify"], "CACHE"),
        (["cache", "verify", "/nowhere", "--rows", "0"], "--rows"),
        (["cache", "info", "/nowhere"], "no reference cache"),
        (["cache", "merge", "out"], "SOURCE"),
        (["cache", "prune", "/nowhere"], "no reference cache"),
    ],
    ids=" ".join,
)
def test_other_commands(fails, words, what):
    assert what in fails(*words)


IDS = {"prompt_ids": [4, 5], "chosen_ids": [6], "rejected_ids": [7]}


@pytest.mark.parametrize("bad", [1 << 63, 1 << 70, True, 1.5, -1, "5", None])
@pytest.mark.parametrize("command", ["train", "precompute"])
def test_ids_that_are_none(fails, model_folder, tmp_path, command, bad):
    for name in IDS:
        data = write_rows(tmp_path / "ids.jsonl", [IDS, {**IDS, name: [*IDS[name], bad]}])
        words = [command, "--model", model_folder, "--dataset", data]
        out = "--output_dir" if command == "train" else "--output"
        said = fails(*words, out, str(tmp_path / "out"))
        assert "ids.jsonl, row 2" in said and "token ids" in said


def test_a_column_called_row_number(train, tmp_path):
    """It is the user's, of whatever type."""
    rows = [{**row, "row_number": f"number {place}"} for place, row in enumerate(text_rows(12))]
    write_rows(tmp_path / "pairs.jsonl", rows)
    assert main([*train, "--max_steps", "1"]) == 0


def test_a_run_whose_loss_is_no_number(fails, train):
    said = fails(*train, "--learning_rate", "1e30", "--max_grad_norm", "0")
    assert "the loss of step" in said and "nan_rows.jsonl" in said


def test_what_is_no_mistake_of_the_users(fails, train, monkeypatch, tmp_path, capfd):
    def broken(*args, **kwargs):
        raise IndexError("deep inside")

    monkeypatch.setattr("fastdpo.run.run", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    said = fails(*train, code=1)
    assert said.startswith("fastdpo: internal error in fastdpo train: IndexError: deep inside; please report it")
    (file,) = tmp_path.glob("fastdpo-traceback-*.txt")
    assert str(file) in said and "in broken" in file.read_text()
    for show in ("--traceback", "FASTDPO_TRACEBACK"):
        if show == "FASTDPO_TRACEBACK":
            monkeypatch.setenv(show, "1")
        assert main([*train, show] if show.startswith("--") else train) == 1
        err = capfd.readouterr().err
        assert "Traceback" in err and "in broken" in err and err.splitlines()[-1].startswith("fastdpo: internal error")
    assert len(list(tmp_path.glob("fastdpo-traceback-*.txt"))) == 1


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "lower --per_device_train_batch_size"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "/tmp/x: No space left on device"),
        (ImportError("needs bitsandbytes", name="bitsandbytes"), "a package is missing: needs bitsandbytes"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_lacks(fails, train, monkeypatch, error, what):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr("fastdpo.run.run", failing)
    assert what in fails(*train)


def test_losses_with_options_of_their_own(train, tmp_path):
    words = [*train, "--loss_type", "simpo", "--loss_options", '{"simpo_gamma": 1.0}', "--max_steps", "1"]
    assert main(words) == 0
    mixed = [*train[:-3], str(tmp_path / "mixed"), "--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.5"]
    assert main([*mixed, "--max_steps", "1"]) == 0


def test_rows_of_ids_beyond_the_model(fails, train, tmp_path):
    rows = random_rows(20)
    rows[0]["chosen_ids"] = [96, 97]
    data = write_rows(tmp_path / "ids.jsonl", rows)
    evaluated = [*train, "--eval_dataset", data]
    assert "held-out data set, row 0 (counted from 0): it holds the id 97" in fails(*evaluated)
