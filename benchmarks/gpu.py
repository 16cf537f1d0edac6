"""The tests or the benchmarks on a GPU machine, from a bare checkout, part by part.

    python benchmarks/gpu.py test|bench [--results FOLDER]

Each part runs in a process of its own under a time limit, so that one that fails or hangs leaves the others' results.
A summary is written for every run; exit code 1 where a part failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import write_result  # noqa: E402


def parts(kind: str, results: str) -> dict[str, tuple[list[str], int]]:
    """name -> (command, seconds allowed); together under nine minutes."""
    pytest = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    if kind == "test":
        return {
            "kernels": ([*pytest, "tests/kernels"], 240),
            "ops": ([*pytest, "tests/ops", "tests/test_functional.py"], 120),
            "attention and models": ([*pytest, "tests/attention", "tests/test_models.py"], 120),
        }
    return {
        "logprobs": (["benchmarks/kernels/logprobs.py", "--results", results], 240),
        "packing": (["benchmarks/step/packing.py", "--results", results], 240),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("test", "bench"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    outcome = {}
    for name, (command, limit) in parts(options.kind, str(options.results)).items():
        print(f"== {name}", flush=True)
        began = time.perf_counter()
        try:
            code: int | str = subprocess.run([sys.executable, *command], cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit} s"
        outcome[name] = {"exit": code, "seconds": round(time.perf_counter() - began, 1)}
    print("\nwritten to", write_result(f"gpu_{options.kind}", {"parts": outcome}, options.results))
    failed = [name for name, part in outcome.items() if part["exit"] != 0]
    print(f"{len(outcome) - len(failed)} passed, {len(failed)} failed" + (f": {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
