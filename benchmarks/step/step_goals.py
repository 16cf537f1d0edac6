"""What a training step means to reach on a GPU, and whether it did.

A speed-up is held against what the counted FLOPs allow: 0.9 of the ratio of both sides' FLOPs in that part, whatever
device, shape and baseline. Fewer tokens cannot save more than their share of the work, so a goal beyond it would be no
goal. MFU is a share of the matrix-product speed that was measured in the same run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

# Padded: TRL, or a plain step where it was not measured. Packed without sharing: our own, which stands for all of them.
BASELINES = (("trl", "plain"), ("varlen",))


@dataclass(frozen=True)
class Goal:
    """About a figure of prefix packing in all parts of these models and this shape (None: of any)."""

    what: str
    figure: str
    limit: float
    models: tuple[str, ...] = ("1B", "8B")
    shape: str | None = None
    at_least: bool = True
    device_type: str = "cuda"

    def concerns(self, part: dict[str, Any]) -> bool:
        return part["model"] in self.models and self.shape in (None, part["shape"])

    def found(self, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """What the goal is called, its limit, the value, and what the value is against."""
        value = part["contestants"]["prefix"][self.figure]
        yield {"goal": self.what, "limit": self.limit, "value": value, "baseline": part["baseline"]}


@dataclass(frozen=True)
class GoalAgainstTrl(Goal):
    """About a figure that says nothing against another baseline."""

    def found(self, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for each in super().found(part):
            yield each | {"value": each["value"] if part["baseline"] == "trl" else None}


@dataclass(frozen=True)
class GoalAgainstEach(Goal):
    """About a ratio to each of `BASELINES`; with `of_flops`, the limit is a share of the FLOP ratio."""

    of_flops: bool = False

    def found(self, part: dict[str, Any]) -> Iterator[dict[str, Any]]:
        ours = part["contestants"]["prefix"]
        for names in BASELINES:
            rows = {name: row for name in names if (row := part["contestants"].get(name)) is not None}
            name = next((name for name, row in rows.items() if row["seconds"] is not None), names[0])
            found = ratios(rows.get(name), ours)
            limit = self.limit
            if self.of_flops:
                limit = None if found["flop_ratio"] is None else self.limit * found["flop_ratio"]
            yield {"goal": f"{self.what} against {name}", "limit": limit, "value": found[self.figure],
                   "baseline": name, "flop_ratio": found["flop_ratio"]}  # fmt: skip


GOALS = (
    GoalAgainstEach("speed-up", "speedup", 0.9, of_flops=True),
    GoalAgainstEach("memory", "memory_ratio", 1.0, at_least=False),
    Goal("MFU", "mfu", 0.45, models=("8B",), shape="full"),
)


def ratios(theirs: dict[str, Any] | None, ours: dict[str, Any], memory: str = "extra_bytes") -> dict[str, Any]:
    """Of two rows: how many times the time and the FLOPs theirs takes, the share of the FLOPs saved that became time
    saved, and how many times their memory ours takes; None where either was not measured."""
    found: dict[str, Any] = dict.fromkeys(("speedup", "flop_ratio", "achieved", "memory_ratio"))
    if theirs is None or theirs["seconds"] is None or ours["seconds"] is None:
        return found
    found["speedup"] = theirs["seconds"] / ours["seconds"]
    found["flop_ratio"] = theirs["flops"] / ours["flops"]
    found["achieved"] = found["speedup"] / found["flop_ratio"]
    if ours[memory] is not None and theirs[memory]:
        found["memory_ratio"] = ours[memory] / theirs[memory]
    return found


def evaluate(
    device_type: str, device: str, parts: Iterable[dict[str, Any]], goals: Iterable[Goal] = GOALS
) -> list[dict[str, Any]]:
    """Every goal in every part that it concerns, with what was measured there."""
    parts = list(parts)
    verdicts = []
    for goal in goals:
        for part in filter(goal.concerns, parts if goal.device_type == device_type else []):
            for found in goal.found(part):
                value, limit = found["value"], found["limit"]
                if value is None or limit is None:
                    verdict = "not measured"
                else:
                    verdict = "met" if (value >= limit if goal.at_least else value <= limit) else "missed"
                verdicts.append({**found, "model": part["model"], "shape": part["shape"], "device": device,
                                 "at_least": goal.at_least, "verdict": verdict})  # fmt: skip
    return verdicts


def line(verdict: dict[str, Any]) -> str:
    title = f"goal {verdict['goal']}, {verdict['model']} {verdict['shape']} on {verdict['device']}"
    if verdict["value"] is None:
        return f"{title}: {verdict['verdict']}"
    bound = f"{'at least' if verdict['at_least'] else 'at most'} {verdict['limit']:.2f}"
    allowed = f" (the FLOPs allow {verdict['flop_ratio']:.2f})" if verdict.get("flop_ratio") else ""
    return f"{title}: {bound}{allowed}, is {verdict['value']:.2f}: {verdict['verdict']}"
