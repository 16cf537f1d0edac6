"""The tests or the benchmarks on a GPU machine, from a bare checkout, part by part.

    python benchmarks/gpu.py test|bench [--results FOLDER]

Each part runs in a process of its own under a time limit, so that one that fails or hangs leaves the others' results.
A summary is written after every part, with the tests that failed; exit code 1 where a part did.
"""

from __future__ import annotations

import argparse
import importlib.util
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import write_result  # noqa: E402

GRACE = 10  # seconds in which an interrupted part may still write what it has
SHOWN = 300  # characters of a failure's message


def parts(kind: str, results: str) -> dict[str, tuple[list[str], int]]:
    """name -> (command, seconds allowed); together under nine minutes."""
    # A failing test does not end its part: one run should tell as much as it can.
    pytest = ["-m", "pytest", "-q", "--tb=short", "--maxfail=40", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        pytest += ["-n", "4"]  # most of the time goes into compiling kernels, on the host
    if kind == "test":
        return {
            "kernels": ([*pytest, "tests/kernels"], 220),
            "ops": ([*pytest, "tests/ops", "tests/functional/test_functional.py"], 160),
            "attention and models": (
                [*pytest, "tests/attention", "tests/models/test_models.py", "tests/reference/test_fill.py"],
                125,
            ),
        }
    return {
        "kernels": (["benchmarks/kernels/logprobs.py", "--seconds", "134", "--results", results], 190),
        "gather": (["benchmarks/kernels/gather.py", "--results", results], 50),
        "train step": (["benchmarks/step/train_step.py", "--seconds", "107", "--results", results], 170),
        "reference": (["benchmarks/reference/precompute_gpu.py", "--seconds", "66", "--results", results], 88),
    }


def run_part(command: list[str], limit: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        if "pytest" in command:
            command = [*command, f"--junitxml={report}"]
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, preexec_fn=_hear_interrupts)
        code: int | str
        if ended_within(process, limit):
            code = process.returncode
        else:
            code = f"stopped after {limit} s"
            process.send_signal(signal.SIGINT)  # pytest then still writes its report
            if not ended_within(process, GRACE):  # waits for the device, say
                process.kill()
                process.wait()
        part = {"exit": code, "seconds": round(time.perf_counter() - began, 1)}
        return {**part, **test_counts(report)} if report.exists() else part


def _hear_interrupts() -> None:
    """Programs started in the background (`nohup make test-gpu &`) ignore SIGINT, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def ended_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def test_counts(report: Path) -> dict[str, Any]:
    """Of pytest's JUnit report: how many tests ran and were skipped, and which failed with what."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failures = []
    for case in cases:
        for kind in ("failure", "error"):
            if (found := case.find(kind)) is not None:
                name = f"{case.get('classname')}::{case.get('name')}"
                failures.append({"test": name, "message": (found.get("message") or kind)[:SHOWN]})
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"tests": len(cases) - skipped, "skipped": skipped, "failures": failures}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("test", "bench"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    outcome: dict[str, dict[str, Any]] = {}
    for name, (command, limit) in parts(options.kind, str(options.results.resolve())).items():
        print(f"== {name}", flush=True)
        outcome[name] = run_part(command, limit)
        written = write_result(f"gpu_{options.kind}", {"parts": outcome}, options.results)
    print("\nwritten to", written)
    for name, part in outcome.items():
        for failure in part.get("failures", []):
            print(f"{name}: {failure['test']}: {failure['message'].splitlines()[0]}")
    failed = [f"{name} ({part['exit']})" for name, part in outcome.items() if part["exit"] != 0]
    print(f"{len(outcome) - len(failed)} passed, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
