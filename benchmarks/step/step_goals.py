"""What a training step means to reach on an H200, and whether it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

DEVICE = "H200"


@dataclass(frozen=True)
class Goal:
    """About the figure of prefix packing in all parts of this model and shape (None: of any)."""

    what: str
    figure: str
    limit: float
    model: str | None = None
    shape: str | None = None
    at_least: bool = True
    against_trl: bool = False  # a figure against something else says nothing
    device: str = DEVICE  # part of the name of the devices that it is meant for

    def concerns(self, part: dict[str, Any]) -> bool:
        return self.model in (None, part["model"]) and self.shape in (None, part["shape"])


GOALS = (
    Goal("speed-up", "speedup", 3.0, shape="hh", against_trl=True),
    Goal("speed-up", "speedup", 1.6, shape="instruct", against_trl=True),
    Goal("speed-up", "speedup", 2.0, shape="long prompt", against_trl=True),
    Goal("speed-up", "speedup", 1.1, shape="long answer", against_trl=True),
    Goal("speed-up", "speedup", 2.0, shape="8 completions", against_trl=True),
    Goal("memory", "memory_ratio", 1.0, at_least=False, against_trl=True),
    Goal("achieved share of the FLOPs saved", "achieved", 0.9),
    Goal("MFU", "mfu", 0.45, model="8B", shape="full"),
)


def evaluate(device: str, parts: Iterable[dict[str, Any]], goals: Iterable[Goal] = GOALS) -> list[dict[str, Any]]:
    """Every goal in every part that it concerns, with what was measured there."""
    verdicts = []
    parts = list(parts)
    for goal in goals:
        for part in filter(goal.concerns, parts if goal.device in device else []):
            value = part["contestants"]["prefix"][goal.figure]
            if value is None or (goal.against_trl and part["baseline"] != "trl"):
                verdict = "not measured"
            else:
                verdict = "met" if (value >= goal.limit) == goal.at_least or value == goal.limit else "missed"
            verdicts.append({"goal": goal.what, "model": part["model"], "shape": part["shape"], "limit": goal.limit,
                             "at_least": goal.at_least, "value": value, "baseline": part["baseline"],
                             "verdict": verdict})  # fmt: skip
    return verdicts


def line(verdict: dict[str, Any]) -> str:
    bound = "at least" if verdict["at_least"] else "at most"
    value = "-" if verdict["value"] is None else f"{verdict['value']:.2f} (baseline {verdict['baseline']})"
    title = f"{verdict['goal']}, {verdict['model']} {verdict['shape']}"
    return f"goal {title}: {bound} {verdict['limit']}, is {value}: {verdict['verdict']}"
