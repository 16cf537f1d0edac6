"""The command line: a whole small run, and one sentence for each mistake."""

import json
from pathlib import Path

import processes
import pytest
from tiny import text_rows, tiny_model, word_tokenizer, write_rows

from fastdpo.cli import main
from fastdpo.types import UserError

GOOD = {"prompt": "a b", "chosen": " yes a", "rejected": " no"}


@pytest.fixture
def run(tmp_path, model_folder, capfd):
    """Runs `fastdpo train` with a good command line but for the changes; returns exit code and stderr."""

    def call(*extra, rows=None, **changes):
        options = {"model": model_folder, "output_dir": str(tmp_path / "out")}
        if "dataset" not in changes:
            options["dataset"] = write_rows(tmp_path / "pairs.jsonl", [GOOD] * 3 if rows is None else rows)
        options |= changes
        code = main(["train", *(part for name, value in options.items() for part in (f"--{name}", value)), *extra])
        return code, capfd.readouterr().err

    return call


def test_a_whole_run(tmp_path, model_folder, capfd):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    arguments = [
        "train", "--model", model_folder, "--dataset", write_rows(tmp_path / "pairs.jsonl", text_rows(40)),
        "--output_dir", str(out), "--learning_rate", "1e-3", "--num_train_epochs", "2",
        "--per_device_train_batch_size", "4", "--label_smoothing", "0.05", "--gradient_checkpointing", "false",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capfd.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert summary["held_out_before"]["pairs"] == summary["held_out_after"]["pairs"] == 4
    assert summary["held_out_after"]["margin"] > summary["held_out_before"]["margin"]
    assert summary["packing"] == "prefix" and summary["speed"]["saved_tokens_fraction"] > 0.2
    assert len(summary["generations"]) == 3
    for text in ("preference accuracy", "mean margin", "before", "after", "tokens saved by sharing", "peak memory"):
        assert text in printed
    assert (out / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    trained = AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)
    before = AutoModelForCausalLM.from_pretrained(model_folder)
    assert any(not a.equal(b) for a, b in zip(trained.parameters(), before.parameters(), strict=True))


def test_too_few_rows_to_hold_any_out(tmp_path, model_folder, capfd):
    arguments = ["train", "--model", model_folder, "--dataset", write_rows(tmp_path / "p.jsonl", text_rows(3))]
    assert main([*arguments, "--output_dir", str(tmp_path / "o"), "--max_steps", "1"]) == 0
    assert json.loads((tmp_path / "o" / "summary.json").read_text())["held_out_before"] is None
    assert "preference accuracy" not in capfd.readouterr().out


def one_sentence(err, *parts):
    lines = [line for line in err.splitlines() if line.startswith("fastdpo: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in lines[0], err


@pytest.mark.parametrize(
    "rows, parts",
    [
        ([GOOD, {"prompt": "a", "rejected": "no"}], ("row 2", "'chosen' is missing", "add it or remove the row")),
        ([GOOD, GOOD, {**GOOD, "rejected": " "}], ("row 3", "'rejected' is empty", "remove the row")),
        ([{**GOOD, "rejected": GOOD["chosen"]}], ("row 1", "are the same", "remove the row")),
        ([{**GOOD, "chosen": ""}, {**GOOD, "prompt": ""}], ("row 1", "1 more rows")),
        ([], ("holds no rows",)),
    ],
)
def test_bad_rows(run, tmp_path, rows, parts):
    code, err = run(rows=rows)
    assert code == 2
    one_sentence(err, "pairs.jsonl", *parts)
    assert not (tmp_path / "out").exists()  # nothing was begun


def test_missing_file(run):
    code, err = run(dataset="/nowhere/pairs.jsonl")
    assert code == 2
    one_sentence(err, "/nowhere/pairs.jsonl", "no such file")


def test_an_option_that_the_command_cannot_honour(run):
    code, err = run("--model_init_kwargs", '{"dtype": "bfloat16"}')
    assert code == 2
    one_sentence(err, "--model_init_kwargs", "train from Python")


def test_missing_eval_file(run):
    code, err = run(eval_dataset="/nowhere/eval.jsonl")
    assert code == 2
    one_sentence(err, "/nowhere/eval.jsonl")


def test_a_model_path_that_is_no_model(run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "headless").mkdir()
    (tmp_path / "headless" / "config.json").write_text("{")
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text('{"model_type": "llama"}')
    problems = {
        "empty": "no config.json",
        "headless": "cannot be read as JSON",
        "weightless": "no weights",
        "nothing": "no such model folder",
    }
    for name, part in problems.items():
        code, err = run(model=str(tmp_path / name))
        assert code == 2
        one_sentence(err, str(tmp_path / name), part)


def test_a_model_whose_weights_are_damaged(run, tmp_path, model_folder):
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in Path(model_folder).iterdir():
        (folder / file.name).write_bytes(file.read_bytes()[: 200 if file.suffix == ".safetensors" else None])
    code, err = run(model=str(folder))
    assert code == 2
    one_sentence(err, str(folder), "cannot be loaded")


def test_a_model_without_its_head(run, tmp_path):
    from transformers import AutoModel

    folder = str(tmp_path / "headless")
    model = tiny_model(tie_word_embeddings=False)
    AutoModel.from_config(model.config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    code, err = run(model=folder)
    assert code == 2
    one_sentence(err, folder, "lm_head.weight")


def test_an_output_folder_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, err = run(output_dir=str(tmp_path / "file" / "out"))
    assert code == 2
    one_sentence(err, str(tmp_path / "file" / "out"), "cannot be written", "--output_dir")


def test_bad_options(run):
    for extra, parts in (
        (("--lerning_rate", "1e-3"), ("--lerning_rate", "did you mean --learning_rate")),
        (("--label_smoothing", "0.9"), ("label_smoothing is 0.9",)),
        (("--save_strategy", "sometimes"), ("sometimes",)),
    ):
        code, err = run(*extra)
        assert code == 2
        one_sentence(err, *parts)
    code, err = run(loss_type="simgoid")
    assert code == 2
    one_sentence(err, "Did you mean 'sigmoid'")


def test_chat_rows_without_a_template(run):
    said = {"prompt": ("user", "why"), "chosen": ("assistant", "yes"), "rejected": ("assistant", "no")}
    row = {name: [{"role": role, "content": content}] for name, (role, content) in said.items()}
    code, err = run(rows=[row])
    assert code == 2
    one_sentence(err, "no chat template")


def test_the_executable_says_one_sentence(tmp_path):
    words = ["train", "--model", "x", "--dataset", "no.jsonl", "--output_dir", "o"]
    done = processes.run("-m", "fastdpo", *words, code=2, cwd=tmp_path)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "fastdpo: no.jsonl: there is no such file; check the path given as the data set."
    ]


def test_help_is_readable(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--model PATH" in out and "example:" in out and len(out.splitlines()) < 70
    assert main([]) == 0 and "train" in capsys.readouterr().out


def test_older_names_of_options(tmp_path):
    """They are carried over as in Python; a config in between must not swallow them."""
    from fastdpo.cli.options import config as made

    line = "--warmup_ratio 0.1 --group_by_length --evaluation_strategy=no --save_safetensors true --weight_decay 0.1"
    with pytest.warns(FutureWarning, match="warmup_ratio is an older name: write warmup_steps=0.1"):
        config = made(str(tmp_path), {"beta": 0.3}, line.split())
    wanted = {"warmup_steps": 0.1, "train_sampling_strategy": "group_by_length", "weight_decay": 0.1, "beta": 0.3}
    assert {name: getattr(config, name) for name in wanted} == wanted
    for words, told in (
        ("--save_safetensors false", "save_safetensors=False"),
        ("--weight_decay 0.1 0.2", "does not know 0.2"),
    ):
        with pytest.raises(UserError, match=told):
            made(str(tmp_path), {}, words.split())
