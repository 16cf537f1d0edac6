"""Writes the README's tables from the result files; with --check, only says whether they are up to date.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A result that nobody has measured yet says so.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MISSING = "not measured"


def results(name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{name}.json"))]


def source(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    return f"{record['device']}; {versions}; commit {record['commit']}; {record['date']}"


def step_hh_cpu() -> str:
    lines = []
    for record in results("step_hh_cpu"):
        ours, theirs = record["fastdpo"], record["trl"]
        lines += [
            f"| {record['pairs']} pairs of HH-RLHF lengths, SmolLM2-135M, float32, batches of 8 | fastdpo | "
            f"TRL {record['versions']['trl']} | fastdpo / TRL |",
            "|---|---:|---:|---:|",
        ]
        for label, key in (
            ("training step with cached reference, s a pair", "seconds_a_pair"),
            ("start: tokenizing and reference log-probs, s", "reference_seconds"),
            ("peak memory, GB", "peak_memory_gb"),
        ):
            ratio = record[f"ratio_{key}"]
            shown = MISSING if ratio is None else f"{ratio:.2f}"
            lines.append(f"| {label} | {ours[key]:.2f} | {theirs[key]:.2f} | {shown} |")
        lines += ["", f"Losses and gradient norms of all steps agreed to 1e-3. {source(record)}.", ""]
    return "\n".join(lines).strip() or f"{MISSING}: run `make bench`"


def gpu() -> str:
    lines = ["| on a GPU | |", "|---|---|"]
    logprobs, packing = results("logprobs"), results("packing")
    on_gpu = [record for record in logprobs if "epyc" not in record["device"].lower()]
    lines.append(f"| log-probs from logits, share of copy bandwidth | {_logprobs(on_gpu)} |")
    lines.append(f"| training step, prefix packing over a plain padded step | {_packing(packing)} |")
    return "\n".join(lines)


def _logprobs(records: list[dict[str, Any]]) -> str:
    cells = []
    for record in records:
        for part in record["from_logits"]:
            share = part["variants"]["fastdpo"]["forward_backward_share_of_ceiling"]
            cells.append(f"{record['device']}, V={part['v']}: {MISSING if share is None else f'{share:.0%}'}")
    return "; ".join(cells) or f"{MISSING} (`make bench-gpu`)"


def _packing(records: list[dict[str, Any]]) -> str:
    cells = []
    for record in records:
        for name, shape in record["shapes"].items():
            speedup = shape["variants"]["prefix"]["speedup_over_plain"]
            cells.append(f"{record['device']}, {name}: {MISSING if speedup is None else f'{speedup:.2f}×'}")
    return "; ".join(cells) or f"{MISSING} (`make bench-gpu`)"


TABLES = {"step_hh_cpu": step_hh_cpu, "gpu": gpu}


def filled(text: str) -> str:
    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = filled(text)
    if "--check" in sys.argv:
        if new != text:
            print("README.md is not what the result files say; run `make tables`.")
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
