"""What becomes of measurements: goals, the GPU driver's summary, and the README's tables."""

import json
import sys

import pytest
from checkout import ROOT
from processes import PATIENCE, run, wait_until

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "kernels")]

import goals  # noqa: E402
import gpu  # noqa: E402
import logprobs  # noqa: E402
import tables  # noqa: E402
from variants import VARIANTS  # noqa: E402


def part(ms, family="logits", n=16384, v=128256, dtype="bfloat16"):
    row = {"ms": ms, "status": "measured" if ms else "numbers disagree"}
    modes = {mode: {"variants": {"fastdpo": row}} for mode in ("no grad", "gradient")}
    return {"family": family, "n": n, "v": v, "dtype": dtype, "modes": modes}


@pytest.mark.parametrize(
    ("device", "parts", "verdicts"),
    [
        ("NVIDIA H200", [part(1.05)], ["met", "met"]),
        ("NVIDIA H200", [part(9.0), part(2.0)], ["missed", "missed"]),
        ("NVIDIA H200", [part(2.0)], ["missed", "met"]),
        ("NVIDIA H200", [part(None)], ["not measured"] * 2),
        ("NVIDIA H200", [part(1.0, n=8192), part(1.0, dtype="float32"), part(1.0, v=49152)], ["not measured"] * 2),
        ("NVIDIA A100", [part(1.05)], []),
    ],
)
def test_goals(device, parts, verdicts):
    found = goals.evaluate(device, parts, goals.GOALS[:2])
    assert [verdict["verdict"] for verdict in found] == verdicts
    assert all(verdict["verdict"] in goals.line(verdict) and verdict["source"] for verdict in found)


def test_goals_are_of_sizes_that_are_measured():
    for goal in goals.GOALS:
        assert (goal.family, goal.shape) in logprobs.SIZES["cuda"]
        assert goal.variant in {variant.name for variant in VARIANTS[goal.family]}


def test_driver_writes_its_summary_even_when_a_part_fails(tmp_path, monkeypatch):
    failing = tmp_path / "test_failing.py"
    failing.write_text(
        "import pathlib, signal\n"
        "def test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_also_bad(): raise KeyError('x')\n"
        f"def test_hangs():\n    pathlib.Path({str(tmp_path / 'hangs')!r}).touch()\n    signal.pause()\n"
    )
    commands = {
        "good": (["-c", "pass"], PATIENCE),
        "bad": (["-c", "raise SystemExit(3)"], PATIENCE),
        "slow": (["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(failing)], 4),
    }
    ended_within = gpu.ended_within

    def ended(process, limit):
        """The limit of 4 seconds is over when the test hangs."""
        if limit != 4:
            return ended_within(process, limit)
        wait_until((tmp_path / "hangs").exists, process)
        return False

    monkeypatch.setattr(gpu, "ended_within", ended)
    monkeypatch.setattr(gpu, "GRACE", PATIENCE)
    monkeypatch.setattr(gpu, "parts", lambda kind, results: commands)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "bench", "--results", str(tmp_path)])
    assert gpu.main() == 1
    (written,) = tmp_path.glob("*/gpu_bench.json")
    parts = json.loads(written.read_text())["parts"]
    assert [part["exit"] for part in parts.values()] == [0, 3, "stopped after 4 s"]
    # Interrupted, pytest still told what it knew.
    assert [failure["test"].split("::")[-1] for failure in parts["slow"]["failures"]] == ["test_bad", "test_also_bad"]


def test_driver_stays_under_nine_minutes():
    for kind in ("test", "bench"):
        assert sum(limit + gpu.GRACE for _, limit in gpu.parts(kind, "x").values()) < 540
    assert gpu.parts("bench", "x")["kernels"][1] <= 260


def test_readme_tables_are_those_of_the_result_files():
    run("benchmarks/tables.py", "--check")


SOURCE = {"device": "NVIDIA H200", "versions": {"torch": "2.11.0"}, "commit": "abc", "date": "2026-11-21 05:27 UTC"}


def row(ms, status="measured", share=0.9, extra_bytes=2e9, **more):
    if ms is None:
        share = extra_bytes = None
    return {"ms": ms, "status": status, "share_of_ceiling": share, "extra_bytes": extra_bytes, **more}


def write(folder, name, record):
    path = folder / "device" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**SOURCE, **record}))


def test_tables_from_results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.gpu().count("not measured") == 2
    assert tables.kernels_cpu().startswith("not measured")
    variants = {
        "fastdpo": row(1.05, share=0.93, extra_bytes=0),
        "fastdpo, in place": row(0.5),
        "eager": row(10.0),
        "Liger": row(None, "numbers disagree"),
        "CCE": row(None, "failed"),
        "CCE, no filter": row(7.0),
        "CCE, other": row(8.0),
        "quack": row(None, "unavailable"),
    }
    modes = {mode: {"variants": variants} for mode in ("no grad", "gradient")}
    record = {
        "device_type": "cuda",
        "parts": [{"family": "logits", "n": 16384, "v": 128256, "modes": modes}],
        "goals": [{"goal": "token_logps, forward", "verdict": "met"}],
    }
    write(tmp_path, "logprobs", record)
    table = tables.gpu().splitlines()
    assert table[0] == "| NVIDIA H200: ms, extra GB | fastdpo | eager | Liger | CCE |"
    assert table[2] == (
        "| log-probs from logits, no gradient, N=16384 V=128256 | 1.05 (93%), 0.00 | 10.00, 2.00 | numbers differ "
        "| 7.00, 2.00 |"
    )
    assert any("token_logps, forward met" in line for line in table)
    assert any("prefix packing" in line and "not measured" in line for line in table)
    write(tmp_path, "logprobs", {**record, "device_type": "cpu"})
    assert tables.gpu().count("not measured") == 2


def test_cpu_table_from_results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    rows = {
        "fastdpo": {"time_ratio": 0.5, "memory_ratio": 0.25, "work_memory_ratio": 0.125},
        "fastdpo, in place": {"time_ratio": 0.4, "memory_ratio": None, "work_memory_ratio": None},
        "eager": {"time_ratio": 1.0, "memory_ratio": 1.0, "work_memory_ratio": 1.0},
    }
    parts = [{"family": "logits", "n": 2048, "v": 49152, "dtype": "float32", "modes": {"gradient": rows}}]
    write(tmp_path, "kernels_cpu", {"threads": 2, "parts": parts})
    assert tables.kernels_cpu().splitlines()[2:4] == [
        "| log-probs from logits, with gradient, N=2048 V=49152 | 0.50 | 0.25 | 0.12 |",
        "| log-probs from logits, with gradient, in place, N=2048 V=49152 | 0.40 | not measured | not measured |",
    ]


def test_train_step_table_from_results(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    table = tables.train_step()
    planned = [part for kind in ("cpu", "cuda") for part in tables.PLANS[kind]]
    assert table.count("not measured") == len(planned)
    assert all(f"| {part} | not measured" in table for part in planned)

    def part(shape, pairs, prefix, baseline="trl"):
        return {"model": "1B", "shape": shape, "pairs": pairs, "baseline": baseline, "contestants": {"prefix": prefix}}

    hh = {"pairs_per_second": 412.34, "speedup": 3.456, "flop_ratio": 3.9, "memory_ratio": None}
    disagreed = dict.fromkeys(hh)
    goals = [{"goal": "speed-up", "model": "1B", "shape": "hh", "verdict": verdict} for verdict in ("met", "missed")]
    alone = hh | dict.fromkeys(("speedup", "flop_ratio"))
    parts = [
        part("hh", 32, hh),
        part("instruct", 16, disagreed, None),
        part("long prompt", 1, hh),
        part("long answer", 8, alone, None),
    ]
    write(tmp_path, "train_step", {"device_type": "cuda", "parts": parts, "goals": goals})
    lines = tables.train_step().splitlines()
    assert "| NVIDIA H200 | pairs/s | speed-up | FLOP ratio | memory ratio |" in lines
    assert "| 1B, hh, 32 pairs | 412 | 3.46× TRL | 3.90× TRL | not measured |" in lines
    assert any(line.startswith("| 1B, instruct, 16 pairs | not measured") for line in lines)
    assert any(
        line.startswith("| 1B, long prompt, 8 pairs | not measured") for line in lines
    )  # another number of pairs
    assert "| 1B, long answer, 8 pairs | 412 | not measured | not measured | not measured |" in lines
    assert lines[-1].endswith("Goals met: 1 of 2 (speed-up, 1B hh: missed).")
    assert "| 135M, hh, 4 pairs | not measured (`make bench`) |" in tables.train_step()
    assert "NVIDIA H200, 1B, hh: 3.46× TRL; NVIDIA H200, 1B, instruct: not measured" in tables.gpu()
