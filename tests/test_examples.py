"""The examples, the benchmarks' scripts at toy size, and the README's tables and code."""

import importlib.util
import json
import re
import subprocess
import sys
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


def run(*command):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout


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


@pytest.mark.parametrize("script", ["kernels/logprobs.py", "step/packing.py"])
def test_gpu_benchmarks_run_at_toy_size(tmp_path, script):
    out = run(f"benchmarks/{script}", "--tiny", "--results", str(tmp_path))
    (written,) = tmp_path.glob("*/*.json")
    record = json.loads(written.read_text())
    assert {"device", "versions", "commit", "date"} <= set(record)
    agreements = [value for key, value in walk(record) if key == "numbers_agree"]
    assert agreements and all(agreements), out


def walk(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from walk(inner)


def test_gpu_driver_writes_its_summary_even_when_a_part_fails(tmp_path, monkeypatch):
    driver = load(ROOT / "benchmarks" / "gpu.py")
    commands = {
        "good": (["-c", "pass"], 60),
        "bad": (["-c", "raise SystemExit(3)"], 60),
        "slow": (["-c", "while 1: pass"], 1),
    }
    monkeypatch.setattr(driver, "parts", lambda kind, results: commands)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "bench", "--results", str(tmp_path)])
    assert driver.main() == 1
    (written,) = tmp_path.glob("*/gpu_bench.json")
    exits = {name: part["exit"] for name, part in json.loads(written.read_text())["parts"].items()}
    assert exits == {"good": 0, "bad": 3, "slow": "stopped after 1 s"}


def test_gpu_parts_stay_under_nine_minutes():
    driver = load(ROOT / "benchmarks" / "gpu.py")
    for kind in ("test", "bench"):
        assert sum(limit for _, limit in driver.parts(kind, "x").values()) <= 540


def test_readme_tables_are_those_of_the_result_files():
    run("benchmarks/tables.py", "--check")


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
