"""What becomes of measurements: goals, the GPU driver and the wheels it brings, and the README's tables."""

import json
import random
import shutil
import subprocess
import sys
import zipfile

import pytest
from checkout import ROOT
from processes import PATIENCE, environment, run, wait_until

sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "kernels")]

import common  # noqa: E402
import goals  # noqa: E402
import gpu  # noqa: E402
import logprobs  # noqa: E402
import tables  # noqa: E402
import wheels  # noqa: E402


def part(share, family="logits", dtype="bfloat16", **shape):
    rows = {"fastdpo": {"share_of_ceiling": share}}
    modes = {mode: {"variants": rows} for mode in ("no grad", "gradient", "frozen head", "trainable")}
    return {"family": family, "dtype": dtype, **({"n": 16384, "v": 128256} | shape), "modes": modes}


@pytest.mark.parametrize(
    ("device_type", "parts", "verdicts"),
    [
        ("cuda", [part(0.9)], ["met", "met"]),
        ("cuda", [part(0.899)], ["missed", "missed"]),
        ("cuda", [part(0.8), part(0.95, v=49152)], ["missed", "met"] * 2),
        ("cuda", [part(None)], ["not measured"] * 2),
        ("cuda", [part(0.9, dtype="float32"), part(0.9, "head", d=4096)], ["not measured"] * 2),
        ("cpu", [part(0.9)], []),
    ],
)
def test_goals_are_shares_of_what_was_reached_in_the_same_run(device_type, parts, verdicts):
    found = goals.evaluate(device_type, parts, ["logits"])
    assert [verdict["verdict"] for verdict in found] == verdicts
    assert all(verdict["verdict"] in goals.line(verdict) for verdict in found)


def test_goals_of_heads_and_of_the_gather():
    head = [part(0.925, "dpo", d=4096), part(0.5, "dpo", d=2304)]
    assert [verdict["verdict"] for verdict in goals.evaluate("cuda", head, ["dpo"])] == ["missed", "missed", "met"]
    gathered = {"family": "gather", "dtype": "bfloat16", "group": "a", "layout": "b",
                "variants": {"fastdpo": {"share_of_ceiling": 0.86}}}  # fmt: skip
    (verdict,) = goals.evaluate("cuda", [gathered], ["gather"])
    assert goals.line(verdict).endswith("there and back, a, b: at least 85% of a copy, is 86.0%: met")


def test_goals_are_of_what_is_measured():
    for goal in goals.GOALS:
        sizes = [shape for family, shape in logprobs.SIZES["cuda"] if family == goal.family]
        assert goal.family == "gather" or any(goal.shape.items() <= size.items() for size in sizes)
        assert goal.share < 1 and goal.ceiling in (goals.COPY, goals.PRODUCT)


# The driver


def test_driver_writes_its_summary_whatever_becomes_of_a_part(tmp_path, monkeypatch):
    failing = tmp_path / "test_failing.py"
    failing.write_text(
        "import pathlib, signal\n"
        "def test_good(): pass\ndef test_bad(): assert 1 == 2\ndef test_also_bad(): raise KeyError('x')\n"
        f"def test_hangs():\n    pathlib.Path({str(tmp_path / 'hangs')!r}).touch()\n    signal.pause()\n"
    )
    commands = {
        "good": ["-c", "pass"],
        "bad": ["-c", "raise SystemExit(3)"],
        "slow": ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(failing)],
        "dead": ["-c", "import os; os.kill(os.getpid(), 9)"],
        "last": ["-c", "pass"],
    }
    written = []

    def ended_within(process, limit):
        """The time of the one that hangs is over when it does; what is interrupted gets all that it needs."""
        if process.args[1:4] == ["-m", "pytest", "-q"] and not (tmp_path / "hangs").exists():
            wait_until((tmp_path / "hangs").exists, process)
            return False
        process.wait(timeout=PATIENCE)
        return True

    def write_result(name, result, folder):
        written.append(list(result["parts"]))
        return common.write_result(name, result, folder)

    monkeypatch.setattr(gpu, "ended_within", ended_within)
    monkeypatch.setattr(gpu, "write_result", write_result)
    monkeypatch.setattr(gpu, "has_gpu", lambda: True)
    monkeypatch.setattr(gpu.Part, "command", lambda part, *_: commands[part.words[1]])
    parts = {name: gpu.Part(("benchmarks/gpu.py", name), 1) for name in commands}
    parts["absent"] = gpu.Part(("benchmarks/no_such_script.py",), 1)
    parts["lacking"] = gpu.Part(("benchmarks/gpu.py",), 1, needs=("no_such_module",))
    monkeypatch.setitem(gpu.PARTS, "bench", parts)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "bench", "--results", str(tmp_path)])
    assert gpu.main() == 1
    (path,) = tmp_path.glob("*/gpu_bench.json")
    found = json.loads(path.read_text())["parts"]
    assert [part["exit"] for part in found.values()][:2] == [0, 3]
    assert found["slow"]["exit"].startswith("stopped after") and found["dead"]["exit"] == "died of SIGKILL"
    assert found["last"]["exit"] == 0 and found["absent"]["exit"] is found["lacking"]["exit"] is None
    assert "no_such_script.py is not there" in found["absent"]["left_out"]
    assert "No module named 'no_such_module'" in found["lacking"]["left_out"]
    assert written == [list(parts)[: number + 1] for number in range(len(parts))]
    # Interrupted, pytest still told what it knew.
    assert [failure["test"].split("::")[-1] for failure in found["slow"]["failures"]] == ["test_bad", "test_also_bad"]


@pytest.mark.parametrize("kind", ["test", "bench"])
def test_parts_share_nine_minutes_and_one_alone_has_them(kind):
    parts = gpu.chosen(kind, [])
    assert sum(gpu.limits(parts, gpu.WHOLE).values()) + gpu.GRACE * len(parts) <= gpu.WHOLE <= 540
    for name, part in gpu.chosen(kind, list(gpu.PARTS[kind])).items():
        assert gpu.limits({name: part}, gpu.WHOLE) == {name: gpu.WHOLE - gpu.GRACE}
        command = part.command(530, "FOLDER", dry=False)
        if kind == "test":
            assert "--gpu-only" in command and (
                part.workers == 1 or command[command.index("-n") + 1] == str(part.workers)
            )
        elif part.last is not None:
            assert command[-3:] == [str(530 - part.last), "--results", "FOLDER"]
    first = next(iter(parts))
    assert gpu.limits(parts, 400)[first] > gpu.limits(parts, 300)[first]  # what others leave over


def test_parts_are_asked_for_by_name(capsys, monkeypatch):
    assert list(gpu.chosen("bench", ["gather", "kernels"])) == ["gather", "kernels"]
    assert "quack" not in gpu.chosen("bench", []) and "quack" in gpu.chosen("bench", ["quack"])
    with pytest.raises(SystemExit, match="test has no part kernel; known are: kernels, stress, ops, "):
        gpu.chosen("test", ["kernels", "kernel"])
    monkeypatch.setattr(sys, "argv", ["gpu.py", "test", "--part", "list"])
    assert gpu.main() == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(gpu.PARTS["test"])


def test_parts_are_there():
    """All but what another script of this list may still have to bring."""
    for part in (*gpu.PARTS["test"].values(), *gpu.PARTS["bench"].values()):
        for word in (*part.words, *(part.dry or ())):
            path = word.split("=")[-1].partition("::")[0]
            if path.startswith(("tests/", "benchmarks/")) and path != "benchmarks/step/trainer_gpu.py":
                assert (ROOT / path).exists(), path


def make_runs(*words):
    """What `make` would run."""
    return subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_keeps_the_path_and_passes_on_what_it_is_given():
    out = make_runs("test-gpu", "PART=kernels stress", "WHEELS=some/folder", "DRY=1", "RESULTS=here")
    assert "PYTHONPATH=.:kernels:tests${PYTHONPATH:+:$PYTHONPATH} " in out
    assert "gpu.py test --part kernels stress --wheels some/folder --dry --results here" in " ".join(out.split())
    assert "gpu.py bench --results benchmarks/results" in " ".join(make_runs("bench-gpu").split())
    assert "wheels.py download B .gpu-wheels" in make_runs("gpu-wheels", "SET=B")


def test_gpu_only_leaves_out_what_never_touches_the_device():
    paths = [f"tests/{path}.py" for path in ("kernels/test_ptx", "ops/test_token_logps", "kernels/test_gather_kv",
                                             "functional/test_float16", "functional/test_losses_on_a_gpu")]  # fmt: skip
    out = run("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "--gpu-only", *paths).stdout
    names = {line.partition("::")[2] for line in out.splitlines() if "::" in line}
    on_the_cpu = {name for name in names if name.endswith(("eager]", "interpreter]", "cpu]"))}
    assert on_the_cpu == {"test_neither_waits_for_the_device[eager]"} and "test_ptx" not in out  # marked gpu
    assert {"test_every_loss[sigmoid]", "test_in_triton[tile]", "test_edges[triton]"} <= names  # mark, mark, parameter
    assert "test_the_check_itself_on_a_cpu[kto]" not in names and "test_a_thousand_tokens[tile]" not in names


@pytest.mark.slow
def test_a_rehearsal_runs_what_a_gpu_would_run(tmp_path):
    out = run("benchmarks/gpu.py", "test", "--dry", "--part", "graphs", env=environment(TMPDIR=tmp_path)).stdout
    (path,) = tmp_path.glob("fastdpo-dry-*/nvidia-h100-80gb-hbm3/gpu_test_graphs.json")
    record = json.loads(path.read_text())
    assert record["dry"] and record["device"] == "NVIDIA H100 80GB HBM3"
    assert record["parts"]["graphs"] | {"seconds": 0} == {
        "exit": 0, "seconds": 0, "tests": 2, "skipped": 0, "failures": []
    }, out  # fmt: skip
    assert "That was a rehearsal." in out


# Wheels


def make_wheel(folder, name, version, requires=(), tag="py3-none-any", files=None):
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f"version = {version!r}\n",
        f"{info}/METADATA": "".join(
            [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", *(f"Requires-Dist: {r}\n" for r in requires)]
        ),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: {tag}\n",
        **(files or {}),
    }
    path = folder / f"{name}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD")))
    return path


def test_wheels_travel_in_pieces_and_are_installed_once_whole(tmp_path, capsys):
    pytest.importorskip("packaging")
    made = tmp_path / "made"
    made.mkdir()
    large = make_wheel(made, "fdlarge", "1.0", files={"fdlarge/data": random.Random(0).randbytes(3000)})
    small = make_wheel(made, "fdsmall", "2.0", ["torch>=999", "fdlarge==1.0", "fdnone; extra == 'all'"],
                       files={"paths.pth": "fdsmall/more\n", "fdsmall/more/fdmore.py": ""})  # fmt: skip
    make_wheel(made, "fdforeign", "1.0", tag="cp27-cp27m-win32")
    whole = large.read_bytes()
    folder = tmp_path / "wheels"
    folders = wheels.laid_out(sorted(made.iterdir()), folder, "b", piece=2000, load=3200)
    assert [each.name for each in folders] == ["b-1", "b-2"] and not list(made.iterdir())
    assert all(sum(file.stat().st_size for file in each.iterdir()) <= 3200 for each in folders)
    pieces = sorted(folder.glob(f"*/{large.name}.piece-*"))
    assert [path.name[-6:] for path in pieces] == ["1-of-2", "2-of-2"]
    assert b"".join(path.read_bytes() for path in pieces) == whole

    (with_small,) = (path.parent for path in folder.glob(f"*/{small.name}"))
    (other,) = (each for each in folders if each != with_small)
    scratch = tmp_path / "scratch"
    site = wheels.install(with_small, scratch)
    told = capsys.readouterr().out
    assert "1 of 2 pieces have come so far" in told and "fdsmall 2.0 wants fdlarge==1.0, and there is none." in told
    assert "fdsmall 2.0 wants torch>=999, and here is" in told and "fdnone" not in told
    assert wheels.install(other, scratch) == site  # another run, with what is missing
    told = capsys.readouterr().out
    assert "wants fdlarge" not in told and "fdforeign-1.0-cp27-cp27m-win32.whl is not for this Python" in told
    program = "import fdlarge, fdsmall, fdmore; print(fdlarge.version, fdsmall.version)"
    assert run("-c", program, env=environment(PYTHONPATH=site)).stdout.split() == ["1.0", "2.0"]
    make_wheel(made, "fdlarge", "1.1")
    wheels.install(made, scratch)
    assert (site / "fdlarge-1.1.dist-info").is_dir() and "fdlarge-1.0" not in capsys.readouterr().out


def test_every_wheel_has_a_version():
    known = wheels.versions()
    assert {name for names in wheels.SETS.values() for name in names} <= set(known)
    for name in ("trl", "liger-kernel", "cut-cross-entropy"):
        assert f"{name}=={known[name]}" in (ROOT / "pyproject.toml").read_text()


# Tables


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
    assert tables.gpu().count("not measured") == 4
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
        "goals": [{"goal": "forward", "case": "N=1", "verdict": verdict} for verdict in ("met", "missed")],
        "problems": ["N=2: left out"],
    }
    write(tmp_path, "logprobs", record)
    table = tables.gpu().splitlines()
    assert table[0] == "| NVIDIA H200: ms, extra GB | fastdpo | eager | Liger | CCE |"
    assert table[2] == (
        "| log-probs from logits, no gradient, N=16384 V=128256 | 1.05 (93%), 0.00 | 10.00, 2.00 | numbers differ "
        "| 7.00, 2.00 |"
    )
    assert any("Goals met: 1 of 2 (forward, N=1: missed). Problems: N=2: left out." in line for line in table)
    assert any("prefix packing" in line and "not measured" in line for line in table)
    write(tmp_path, "logprobs", {**record, "device_type": "cpu"})
    assert tables.gpu().count("not measured") == 4


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


H100 = "NVIDIA H100 80GB HBM3"
MARKS = "<!-- table: {} -->\nold\n<!-- end -->"


def write_for(monkeypatch, folder, device, name, record):
    monkeypatch.setattr(common, "environment", lambda: {**SOURCE, "device": device})
    return common.write_result(name, record, folder)


def test_tables_of_two_devices_one_of_which_failed_in_part(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    gathered = {"family": "gather", "group": "pair, short", "layout": "tokens first", "t": 10, "k": 16}
    modes = {mode: {"variants": {"fastdpo": row(1.05)}} for mode in ("no grad", "gradient")}
    kernels = {"family": "logits", "n": 16384, "v": 128256, "modes": modes}
    steps = [
        {"model": "1B", "shape": "hh", "pairs": 32, "baseline": "trl", "contestants": {
            "prefix": {"pairs_per_second": speed, "speedup": 3.0, "flop_ratio": 3.5, "memory_ratio": 0.5}}}
        for speed in (100.0, 140.0)
    ]  # fmt: skip
    passes = {"model": "8B", "shape": "hh", "pairs": 256, "baseline": None, "contestants": {
        "prefix": {"seconds": 2.0, "tokens_per_second": 5e4, "share_of_ceiling": 0.62, "device_seconds": 1.9,
                   "speedup": None}}}  # fmt: skip
    common_fields = {"device_type": "cuda", "goals": [], "problems": []}
    for device, ms, step in ((H100, None, steps[0]), ("NVIDIA H200", 0.04, steps[1])):
        part = {**gathered, "variants": {name: row(ms) for name in ("fastdpo", "index_select")}}
        write_for(monkeypatch, tmp_path, device, "gather", {**common_fields, "parts": [part]})
        write_for(monkeypatch, tmp_path, device, "train_step", {**common_fields, "parts": [step]})
        kernel = {"forward": {name: row(ms) for name in ("per thread", "per row")}}
        part = {"n": 16384, "v": 128256, "softcap": 30.0, "kernels": kernel}
        write_for(monkeypatch, tmp_path, device, "rows", {**common_fields, "parts": [part]})
    # The H100's kernels stopped before the first part, and its reference pass was never begun.
    failed = common_fields | {"parts": [], "problems": ["log-probs from logits: out of memory"]}
    write_for(monkeypatch, tmp_path, H100, "logprobs", failed)
    write_for(monkeypatch, tmp_path, "NVIDIA H200", "logprobs", {**common_fields, "parts": [kernels]})
    write_for(monkeypatch, tmp_path, "NVIDIA H200", "reference_gpu", {**common_fields, "parts": [passes]})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nvidia-h100-80gb-hbm3", "nvidia-h200"]

    text = tables.filled("\n".join(map(MARKS.format, [*tables.TABLES, "not_measured"])))
    of_rows, _, missing = text.partition("<!-- table: not_measured -->")
    for wanted in (
        f"| {H100} | pairs/s |", "| 1B, hh, 32 pairs | 100 | 3.00× TRL |", "| NVIDIA H200 | pairs/s |",
        "| 1B, hh, 32 pairs | 140 | 3.00× TRL |", "| NVIDIA H200: ms, extra GB | fastdpo |", "1.05 (90%)",
        "| 8B, hh, 256 pairs | 50,000 | 62% |", "| pair, short, tokens first, T=10 K=16 | 0.040 (90%) | 0.040 (90%) |",
        "| forward, N=16384 V=128256, softcap 30 | 0.040 (90%) | 0.040 (90%) |",
        "Problems: log-probs from logits: out of memory.", f"{H100}, 1B, hh: 3.00× TRL; NVIDIA H200, 1B, hh: 3.00× TRL",
    ):  # fmt: skip
        assert wanted in of_rows, wanted
    assert "| not measured (" not in of_rows and "| pair, short, tokens first, T=10 K=16 | not" not in of_rows
    rows = [line for line in missing.splitlines() if line.startswith("- ")]
    assert f"<summary>{len(rows)} rows are not measured yet</summary>" in missing and "</details>" in missing
    assert f"- training step, {H100}: 8B, hh, 16 pairs (`make bench-gpu`)" in rows
    assert "- reference pass, NVIDIA H200: 1B, hh, 512 pairs (`make bench-gpu`)" in rows
    assert any(line.startswith(f"- {H100}: gather of keys and values") for line in rows)
    assert any("training beside TRL on a CPU: `make bench`" in line for line in rows)


def test_nothing_is_collapsed_once_all_is_measured():
    assert tables.collapsed([]) == ""
    whole = "| a | b |\n|---|---:|\n| x | 1 |\n| y | 2, not measured |\n\nsource"
    assert tables.measured("t", whole) == (whole, [])
    assert tables.measured("t", whole.replace("| 1 |", "| not measured |"))[1] == ["a: x"]
