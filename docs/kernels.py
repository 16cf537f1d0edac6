"""Writes the tables of docs/kernels.md: compiles the row kernels and their predecessors for GPUs that need not be here.

Nothing is run. Instructions are counted in the assembly (`tests/kernels/compile_ahead.py`); times follow from them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "kernels.md"
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")

# kernel and variant as compile_ahead names them -> title, bytes of a bf16 logit that move
ROWS = {
    ("forward", "bfloat16"): ("forward", 2),
    ("forward", "bfloat16 stats"): ("forward, statistics", 2),
    ("forward", "bfloat16 softcap"): ("forward, softcap", 2),
    ("forward", "bfloat16 softcap stats"): ("forward, softcap, statistics", 2),
    ("one pass", "bfloat16"): ("one pass", 4),
    ("one pass", "bfloat16 stats"): ("one pass, statistics", 4),
    ("one pass", "bfloat16 softcap"): ("one pass, softcap", 4),
    ("one pass", "bfloat16 softcap stats"): ("one pass, softcap, statistics", 4),
    ("backward", "bfloat16 in place"): ("backward", 4),
    ("backward", "bfloat16 softcap in place"): ("backward, softcap", 4),
}

# An H200: bytes a second of a copy as it was measured on one, multiprocessors, instructions and exponentials that one
# of them issues a cycle, cycles a second.
COPY, PROCESSORS, ISSUED, SPECIAL, CLOCK = 4.3e12, 132, 128, 16, 1.755e9
N, V = 16384, 128256


def counted(*options: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    """(target, kernel, variant) -> what compile_ahead prints of it; of the two combinations of plain bf16."""
    script = ROOT / "tests" / "kernels" / "compile_ahead.py"
    command = [sys.executable, str(script), *(f"{target}:0,1" for target in TARGETS)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([*command, *options], check=True, capture_output=True, text=True, env=environment)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["gpu"], row["kernel"], row["variant"]): row for row in rows}


def instructions(before: dict[Any, Any], after: dict[Any, Any]) -> str:
    lines = [f"| instructions an element | {' | '.join(TARGETS)} |", f"|---|{'---|' * len(TARGETS)}"]
    for (kernel, variant), (title, _) in ROWS.items():
        cells = [
            f"{before[gpu, kernel, variant]['instructions']:.1f} → {after[gpu, kernel, variant]['instructions']:.1f}"
            for gpu in TARGETS
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def documented(target: str, kernel: str, variant: str) -> str | None:
    """Instructions an element as the page has them; None where it has none, or has those of another Triton."""
    text = PAGE.read_text()
    if (kernel, variant) not in ROWS or target not in TARGETS or f"triton {version('triton')}.\n" not in text:
        return None
    line = next(
        line for line in text.splitlines() if line.startswith(f"| {ROWS[kernel, variant][0]} | ") and "→" in line
    )
    return line.split(" | ")[1 + TARGETS.index(target)].removesuffix(" |").split("→ ")[1]


def resources(after: dict[Any, Any]) -> str:
    lines = [
        "| on sm_90 | registers | spills | barriers in the loop | exponentials and divisions an element |",
        "|---|---|---|---|---|",
    ]
    for (kernel, variant), (title, _) in ROWS.items():
        row = after["sm_90", kernel, variant]
        lines.append(f"| {title} | {row['registers']} | {row['spills']} | {row['barriers']} | {row['special']:.2f} |")
    return "\n".join(lines) + "\n"


def times(before: dict[Any, Any], after: dict[Any, Any]) -> str:
    lines = [
        "| predicted ms, N=16384, V=128256 | memory | issue | exponentials and divisions | measured |",
        "|---|---|---|---|---|",
    ]
    for (kernel, variant), (title, moved) in ROWS.items():
        memory = N * V * moved / COPY
        issue, special = (
            [
                1e3 * N * V * found["sm_90", kernel, variant][what] / (PROCESSORS * rate * CLOCK)
                for found in (before, after)
            ]
            for what, rate in (("instructions", ISSUED), ("special", SPECIAL))
        )
        cells = [f"{1e3 * memory:.2f}", *(f"{old:.2f} → {new:.2f}" for old, new in (issue, special)), "not measured"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    before, after = counted("--predecessors"), counted()
    tables = {
        "instructions": instructions(before, after), "resources": resources(after), "times": times(before, after),
        "versions": f"Compiled by triton {version('triton')}.\n",
    }  # fmt: skip
    text = PAGE.read_text()
    for name, table in tables.items():
        begin = f"<!-- table: {name} -->\n"
        start = text.index(begin) + len(begin)
        text = text[:start] + table + text[text.index("<!-- end -->", start) :]
    PAGE.write_text(text)
    print("written to", PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
