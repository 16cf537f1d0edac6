"""The examples, and the README's code."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_model, word_tokenizer

ROOT = Path(__file__).resolve().parent.parent


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_custom_loop(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"why {w}", "chosen": " yes", "rejected": " no no"} for w in ("a", "b", "c", "d")] * 4
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    losses = load(ROOT / "examples" / "custom_loop.py").main(
        ["--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "pairs.jsonl"), "--learning_rate", "1e-2"]
    )
    assert losses[0] == pytest.approx(0.693147, abs=1e-4) and losses[1] < losses[0] - 0.05


@pytest.mark.slow
def test_toy_counterintuitive(demo_model):
    before, after = load(ROOT / "examples" / "toy_counterintuitive.py").main(["--model", str(demo_model)])
    assert before <= 1 and after == 4


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
