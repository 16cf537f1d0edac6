"""The tests under other machines' arithmetic and load: `make test-portable`.

    python tests/portable.py [--only NAME ...] [-- PYTEST ARGUMENTS]

A CPU without AVX-512 rounds otherwise than one with it, and PyTorch, oneDNN and MKL can each be held to what an older
CPU knows: so the tests that compare numbers run. Under load, on more workers than cores, and twice in a row, all do.
Runs one setting after the other, prints a line for each, and fails if one fails. `-- --fast` takes a case or two of
everything.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Of the others, what is compared is the output of a compiler or of an interpreter, the same run with itself, or text.
NUMBERS = [
    *(f"tests/{room}" for room in ("losses", "functional", "ops", "packing", "attention", "models", "reference")),
    "tests/trainer", "--ignore=tests/trainer/test_resume.py", "--ignore=tests/trainer/test_survival.py",
]  # fmt: skip
OLDER_LIBRARIES = {"ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@dataclass(frozen=True)
class Setting:
    environment: dict = field(default_factory=dict)
    tests: list = field(default_factory=list)  # none: all
    workers: int = 2
    busy: int = 0  # processes that do nothing but take time
    needs: str = ""  # a flag of the CPU


SETTINGS = {
    "plain": Setting(),
    "again": Setting(),
    "aten-default": Setting({"ATEN_CPU_CAPABILITY": "default"}, NUMBERS),
    "aten-avx2": Setting({"ATEN_CPU_CAPABILITY": "avx2"}, NUMBERS, needs="avx2"),
    "aten-avx512": Setting({"ATEN_CPU_CAPABILITY": "avx512"}, NUMBERS, needs="avx512f"),
    "libraries-avx2": Setting(OLDER_LIBRARIES, NUMBERS, needs="avx2"),
    "one-thread": Setting({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, NUMBERS),
    "four-workers": Setting(workers=4),
    "loaded": Setting(busy=2),
}


def cpu_flags():
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def run(setting, arguments):
    """Exit code, pytest's summary, and the tests that failed."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(setting.busy)]
    tests = [] if any(word.startswith("tests") for word in arguments) else setting.tests
    command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist", "-n", str(setting.workers), *tests, *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **setting.environment}, capture_output=True, text=True
        )
    finally:
        for process in busy:
            process.kill()
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    summary = next((line for line in reversed(lines) if re.search(r"\b(passed|failed|error)", line)), "no summary")
    if done.returncode and not failed:
        failed = (lines + done.stderr.splitlines())[-20:]
    return done.returncode, summary.strip("= "), failed


def main():
    own, arguments = _split(sys.argv[1:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    flags, bad = cpu_flags(), []
    for name in parser.parse_args(own).only:
        setting = SETTINGS[name]
        if setting.needs and setting.needs not in flags:
            print(f"{name:16} skipped: this CPU has no {setting.needs}", flush=True)
            continue
        began = time.monotonic()
        code, summary, failed = run(setting, arguments)
        print(
            f"{name:16} {'passed' if code == 0 else 'FAILED'} {time.monotonic() - began:5.0f} s  {summary}", flush=True
        )
        for line in failed:
            print(f"    {line}", flush=True)
        bad += [name] * (code != 0)
    print(f"failed: {', '.join(bad)}" if bad else "all passed")
    return 1 if bad else 0


def _split(words):
    """Own words, and those of pytest behind `--`."""
    if "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


if __name__ == "__main__":
    sys.exit(main())
