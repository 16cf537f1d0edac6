"""The examples, and the README's code."""

import ast
import json
import math
import re
from pathlib import Path

import pytest
import torch
from checkout import ROOT, load
from tiny import tiny_model, word_tokenizer, write_rows


@pytest.fixture
def example(tmp_path, monkeypatch):
    """Runs an example's `main` on a tiny model and rows; what it leaves behind stands in folders of this test."""
    home, here = tmp_path / "home", tmp_path / "here"
    for folder in (home, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(home))

    def run(name, *arguments, rows=None, model=True):
        words = list(arguments)
        if model:
            folder = tmp_path / "model"
            tiny_model().save_pretrained(folder)
            word_tokenizer().save_pretrained(folder)
            words += ["--model", str(folder)]
        if rows is not None:
            words += ["--dataset", write_rows(tmp_path / "rows.jsonl", rows)]
        torch.manual_seed(0)
        result = load(ROOT / "examples" / f"{name}.py").main(words)
        assert not [*home.rglob("*"), *here.rglob("*")]
        return result

    return run


@pytest.mark.parametrize("options, fall", [((), 0.2), (("--lora",), 0.05)])
def test_custom_loop(example, capsys, options, fall):
    rows = [{"prompt": f"why {w}", "chosen": " yes", "rejected": " no no"} for w in ("a", "b", "c", "d")] * 4
    if options:
        pytest.importorskip("peft")
    losses = example("custom_loop", "--learning_rate", "1e-2", *options, rows=rows)
    assert len(losses) == 2 and losses[0] == pytest.approx(0.693147, abs=1e-4) and losses[1] < losses[0] - fall
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("loss ")]
    assert [float(line.split()[1]) for line in printed] == pytest.approx(losses, abs=1e-4)
    margins = [float(line.split()[3]) for line in printed]
    assert margins[0] == pytest.approx(0.0, abs=1e-3) and margins[1] > 0.05


def test_the_custom_loop_is_short():
    """Lines of code of `train`, without blank ones, comments and the docstring."""
    source = (ROOT / "examples" / "custom_loop.py").read_text()
    (train,) = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "train"]
    body = train.body[1:] if ast.get_docstring(train) else train.body
    lines = source.splitlines()[train.lineno - 1 : train.body[0].lineno - 1]
    lines += source.splitlines()[body[0].lineno - 1 : train.end_lineno]
    assert sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines) < 25


def test_plain_logits(example, capsys):
    accuracies = example("plain_logits", "--steps", "8", model=False)
    assert len(accuracies) == 8 and accuracies[0] < 0.6 and accuracies[-1] == 1.0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    losses = [float(words[3]) for words in printed]
    assert losses[0] == pytest.approx(0.693147, abs=1e-3) and losses[-1] < 0.3 and len(losses) == 8
    assert [float(words[5]) for words in printed] == pytest.approx(accuracies, abs=0.01)


def test_ranked_lists(example, capsys):
    rows = [
        {"prompt": f"why {word}", "completions": [" no no", " yes", " hello"], "ranks": [3, 1, 2]} for word in "abcde"
    ]
    rows += [{"prompt": f"why {word} {word}", "completions": [" yes", " no no", " hello"]} for word in "abc"]
    history = example("ranked_lists", "--epochs", "4", "--learning_rate", "1e-2", rows=rows)
    (first, _), (last, ordered) = history[0], history[-1]
    assert len(history) == 8 and first == pytest.approx(math.log(6), abs=1e-3)  # of 3! orders each as likely
    assert last < 0.6 * first and ordered > 0.8
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [(float(words[3]), float(words[6])) for words in printed] == [
        (pytest.approx(loss, abs=1e-4), pytest.approx(share, abs=0.01)) for loss, share in history
    ]


def test_online_samples(example, capsys):
    rewards = example("online_samples", "--steps", "14", "--learning_rate", "1e-2")
    assert len(rewards) == 14 and sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.1
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [float(words[4]) for words in printed] == pytest.approx(rewards, abs=1e-3)


@pytest.mark.slow
def test_toy_counterintuitive(demo_model):
    before, after = load(ROOT / "examples" / "toy_counterintuitive.py").main(
        ["--model", str(demo_model), "--epochs", "4"]
    )
    assert before <= 1 and after >= 3


def test_readme_code_of_the_logits_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (block,) = [block for block in blocks if "fastdpo.loss(logits" in block]
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {})
    assert "tensor(" in capsys.readouterr().out


def test_readme_code_of_the_trainer_and_the_cache_runs(tmp_path, monkeypatch):
    """The three other blocks, with a tiny model in the place of the reader's."""
    import fastdpo

    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("my-model")
    word_tokenizer().save_pretrained("my-model")
    row = {"prompt": "why a", "chosen": " yes", "rejected": " no"}
    Path("pairs.jsonl").write_text(json.dumps(row) + "\n")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    trl, loop, reference = (next(b for b in blocks if text in b) for text in ("from trl", "batch_loss(", "precompute("))
    names = {}
    exec(compile(trl, "README.md", "exec"), names)
    assert names["trainer"].state.global_step == 3
    ids = {"prompt_ids": [4, 5], "chosen_ids": [6, 7], "rejected_ids": [8]}
    names |= {"fastdpo": fastdpo, "model": tiny_model(), "rows": [ids], "ref_logps": torch.zeros(2)}
    exec(compile(loop, "README.md", "exec"), names)
    assert names["output"].loss.item() > 0
    names["reference_model"] = names["model"]
    names["DPOTrainer"] = lambda *a, **k: fastdpo.DPOTrainer(*a, processing_class=word_tokenizer(), **k)
    exec(compile(reference, "README.md", "exec"), names)
    assert len(names["cache"]) == 2
