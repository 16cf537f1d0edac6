"""The tests or the benchmarks on a GPU machine, from a bare checkout, part by part.

    python benchmarks/gpu.py test|bench [--part NAME...] [--results FOLDER] [--wheels FOLDER] [--dry]

--part     these parts alone, in the order given; `list` says which there are. One part gets the whole time, several
           share it, and what one leaves over goes to those behind it.
--wheels   a folder of `make gpu-wheels`: what is in it is installed beside what the machine has, without a network.
--dry      a rehearsal on the CPU, a few small cases of each part with a fake of the device (`fake_gpu.py`); its results
           go to a folder of their own. Also what happens where there is no GPU.

Each part runs in a process of its own under a time limit, so that one that fails, hangs or dies leaves the others'
results. A summary is written after every part, with the tests that failed; exit code 1 where a part did.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import fake_gpu  # noqa: E402
from common import write_result  # noqa: E402
from wheels import install  # noqa: E402

WHOLE = 540  # seconds for all parts of a run together, so that a machine lent for ten minutes is enough
GRACE = 10  # of them, those in which an interrupted part may still write what it has
SHOWN = 300  # characters of a failure's message


@dataclass(frozen=True)
class Part:
    """What runs in one process.

    words    of Python's command line: a script, or pytest's arguments where `workers` is given
    weight   its share of the time, in seconds of a whole run
    workers  of pytest: most of the time goes into compiling kernels, on the host
    last     of a benchmark: seconds that its last measurement may take. The rest of its limit is the time within which
             one may begin, its `--seconds`; None for a script that has no such option.
    dry      arguments in place of `words` in a rehearsal; None: the same, of benchmarks with --tiny
    needs    modules without which it is left out
    named    whether it runs only where it is asked for
    """

    words: tuple[str, ...]
    weight: int
    workers: int | None = None
    last: int | None = None
    dry: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ()
    named: bool = False

    def command(self, limit: float, results: str, dry: bool) -> list[str]:
        words = list(self.words if self.dry is None or not dry else self.dry)
        if self.workers is not None:
            # A failing test does not end its part: one run should tell as much as it can.
            pytest = ["-m", "pytest", "-q", "--tb=short", "--maxfail=40", "-p", "no:cacheprovider", "--gpu-only"]
            if self.workers > 1 and not dry and importlib.util.find_spec("xdist") is not None:
                pytest += ["-n", str(self.workers)]
            return [*pytest, *words]
        if dry:
            words = ["benchmarks/fake_gpu.py", *words, *(["--tiny"] if self.dry is None else [])]
        if self.last is not None:
            words += ["--seconds", f"{max(limit / 2, limit - self.last):.0f}"]
        return [*words, "--results", results]

    def lacks(self, environment: dict[str, str]) -> str | None:
        """Why it cannot run here."""
        script = ROOT / self.words[0]
        if self.workers is None and not script.exists():
            return f"{self.words[0]} is not there"
        for module in self.needs:
            tried = subprocess.run(
                [sys.executable, "-c", f"import {module}"], cwd=ROOT, env=environment, capture_output=True, text=True
            )
            if tried.returncode:
                return f"`import {module}` fails: {(tried.stderr.strip().splitlines() or ['?'])[-1][:SHOWN]}"
        return None


STRESS = "tests/kernels/test_stress_on_a_gpu.py"
KERNELS = ("tests/kernels", f"--ignore={STRESS}")
OPS = ("tests/ops", *(f"tests/functional/test_{name}.py" for name in ("functional", "float16", "losses_on_a_gpu")))
ATTENTION = ("tests/attention", "tests/models/test_models.py")
ON_A_GPU = "tests/trainer/test_on_a_gpu.py"
STEP = "benchmarks/step/train_step.py"
TRAINERS = (ON_A_GPU, "tests/trainer/test_dpo.py", "-k", "not cache_filled")

PARTS: dict[str, dict[str, Part]] = {
    # In the order in which to learn from them: a wrong kernel explains what fails behind it. A rehearsal leaves out
    # what is too large for a CPU, and what a fake cannot do.
    "test": {
        "kernels": Part(KERNELS, 150, workers=8, dry=(*KERNELS, "--fast", "-k", "not beyond and not more_than")),
        "stress": Part((STRESS,), 60, workers=1, dry=(STRESS, "-k", "itself")),
        "ops": Part(
            (*OPS, "-k", "not cuda_graph"), 110, workers=8,
            dry=(*OPS, "--fast", "-k", "not cuda_graph and not memory_on_a_gpu and not checkpointing"),
        ),
        # Apart from the others: a capture that fails leaves a process that can do no more.
        "graphs": Part(
            ("tests/ops", "-k", "cuda_graph"), 35, workers=1, dry=("tests/ops", "-k", "cuda_graph and eager")
        ),
        "attention": Part(ATTENTION, 80, workers=8, dry=(*ATTENTION, "--fast", "-k", "not kernels_on_a_gpu")),
        "trainers": Part(TRAINERS, 70, workers=8, dry=(ON_A_GPU, "-k", "KTO or Reward"), needs=("datasets",)),
        "precompute": Part(
            ("tests/reference/test_fill.py", ON_A_GPU, "-k", "not nothing_waits"), 35, workers=4,
            dry=(ON_A_GPU, "-k", "cache_filled"),
        ),
    },
    "bench": {
        "kernels": Part(("benchmarks/kernels/logprobs.py",), 190, last=56),
        "rows": Part(("benchmarks/kernels/rows.py",), 45),
        "gather": Part(("benchmarks/kernels/gather.py",), 50),
        "step": Part((STEP,), 130, last=63, dry=(STEP, "--tiny", "--shapes", "hh")),
        "trainer": Part(("benchmarks/step/trainer_gpu.py",), 110, last=40),
        "reference": Part(("benchmarks/reference/precompute_gpu.py",), 88, last=22),
        "tune": Part(("benchmarks/kernels/rows.py", "--tune"), 90, named=True),
        # With the second set of wheels, in what time is left.
        "quack": Part(("benchmarks/kernels/logprobs.py", "--only", "fastdpo", "quack"), 190, last=56, named=True),
    },
}  # fmt: skip


def chosen(kind: str, names: list[str]) -> dict[str, Part]:
    """The parts of these names; without any, all that need not be asked for."""
    known = PARTS[kind]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"{kind} has no part {', '.join(unknown)}; known are: {', '.join(known)}.")
    return {name: known[name] for name in names} if names else {n: part for n, part in known.items() if not part.named}


def listed(kind: str) -> str:
    lines = []
    for name, part in PARTS[kind].items():
        words = " ".join(part.words) + ("  (only where it is asked for)" if part.named else "")
        lines.append(f"{name:12}{words}")
    return "\n".join(lines)


def limits(parts: dict[str, Part], left: float) -> dict[str, float]:
    """Seconds for each of these parts, one behind another, by their weights."""
    weights = sum(part.weight for part in parts.values())
    return {name: max(1.0, left * part.weight / weights - GRACE) for name, part in parts.items()}


def run_part(command: list[str], limit: float, environment: dict[str, str] | None = None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        if "pytest" in command:
            command = [*command, f"--junitxml={report}"]
        began = time.perf_counter()
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, preexec_fn=_own_group)
        code: int | str
        try:
            if ended_within(process, limit):
                code = process.returncode
                if code < 0:
                    code = f"died of {signal.Signals(-code).name}"
            else:
                code = f"stopped after {limit:.0f} s"
                process.send_signal(signal.SIGINT)  # pytest then still writes its report
                ended_within(process, GRACE)
        finally:  # and its workers, which would hold on to the device
            _end_group(process)
        part = {"exit": code, "seconds": round(time.perf_counter() - began, 1)}
        return {**part, **test_counts(report)} if report.exists() else part


def _own_group() -> None:
    """Programs started in the background (`nohup make test-gpu &`) ignore SIGINT, and so would what they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.setpgrp()


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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


def run_parts(
    kind: str, parts: dict[str, Part], results: Path, environment: dict[str, str], dry: bool, began: float
) -> dict[str, dict[str, Any]]:
    """What became of each, written anew after every one."""
    outcome: dict[str, dict[str, Any]] = {}
    name_of_result = f"gpu_{kind}" if parts.keys() == chosen(kind, []).keys() else f"gpu_{kind}_{'_'.join(parts)}"
    waiting = dict(parts)
    for name, part in parts.items():
        if why := part.lacks(environment):
            outcome[name] = {"exit": None, "seconds": 0.0, "left_out": why}
            print(f"== {name}: left out, {why}", flush=True)
        else:
            limit = limits(waiting, began + WHOLE - time.monotonic())[name]
            print(f"== {name}, {limit:.0f} s at most", flush=True)
            outcome[name] = run_part(part.command(limit, str(results), dry), limit, environment)
        del waiting[name]
        device = {"device": fake_gpu.NAME} if dry else {}
        written = write_result(name_of_result, {**device, "dry": dry, "parts": outcome}, results)
    print("\nwritten to", written)
    return outcome


def report(outcome: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, part in outcome.items():
        if "left_out" in part:
            lines.append(f"{name}: left out, {part['left_out']}")
        for failure in part.get("failures", []):
            lines.append(f"{name}: {failure['test']}: {failure['message'].splitlines()[0]}")
    ran = {name: part for name, part in outcome.items() if "left_out" not in part}
    failed = [f"{name} ({part['exit']})" for name, part in ran.items() if part["exit"] != 0]
    lines.append(
        f"{len(ran) - len(failed)} passed, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else "")
    )
    return "\n".join(lines)


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("test", "bench"))
    parser.add_argument("--part", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    if options.part == ["list"]:
        print(listed(options.kind))
        return 0
    parts = chosen(options.kind, options.part)
    environment = dict(os.environ)
    if options.wheels is not None:
        _on_path(environment, install(options.wheels))
    dry = options.dry or not has_gpu()
    results = options.results.resolve()
    if dry:
        results = Path(tempfile.mkdtemp(prefix="fastdpo-dry-"))
        _on_path(environment, ROOT / "benchmarks")
        environment["PYTEST_PLUGINS"] = "fake_gpu"
        print("A rehearsal: nothing here says anything about a GPU.", flush=True)
    outcome = run_parts(options.kind, parts, results, environment, dry, began)
    print(report(outcome))
    if dry:
        print("That was a rehearsal." if options.dry else "That was a rehearsal, for there is no GPU here.")
    return 1 if any(part["exit"] for part in outcome.values()) else 0


def has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        raise SystemExit(f"{sys.executable} has no torch; GPU_PYTHON=... names a Python that has.") from None
    return torch.cuda.is_available()


def _on_path(environment: dict[str, str], folder: Path) -> None:
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (environment.get("PYTHONPATH"), str(folder))))


if __name__ == "__main__":
    sys.exit(main())
