"""The registry as a table, for people."""

from __future__ import annotations

import sys
from typing import TextIO

from fastdpo.losses.registry import REGISTRY, LossSpec

HEADS = ("name", "data", "formula", "source", "needs", "options")


def list_losses(file: TextIO | None = None) -> tuple[str, ...]:
    """Prints every loss: its name, data, formula, paper (with the arXiv number), what it needs, which options it takes.

    In the formulas, Δ = logp - ref_logp of an answer; s its score, f'(e^Δ) of an f-divergence, by default Δ;
    δ = s_c - s_r; c chosen, r rejected; L tokens; ε label_smoothing.

    Returns:
        The names.
    """
    rows = [HEADS, *map(cells, REGISTRY.values())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS) - 1)]
    for row in rows:
        padded = [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
        print("  ".join(padded).rstrip(), file=file or sys.stdout)
    return tuple(REGISTRY)


def markdown() -> str:
    """The same table for the documentation."""
    lines = ["| " + " | ".join(HEADS) + " |", "|" + "---|" * len(HEADS)]
    for spec in REGISTRY.values():
        name, data, formula, *rest = cells(spec)
        lines.append(f"| `{name}` | {data} | {formula} | " + " | ".join(rest) + " |")
    return "\n".join(lines) + "\n"


def cells(spec: LossSpec) -> tuple[str, ...]:
    """One row, in the order of HEADS."""
    options = ", ".join(spec.honours)
    return spec.name, spec.data, spec.formula, spec.source, ", ".join(spec.needs), options
