"""What the kernels mean to reach, as shares of what the device reached in the same run, and whether they did.

So a goal is the same on every GPU. It is one only where the way taken needs no more work than is counted: one read of
the logits forward, two and a write with a gradient; 2, 4 and 6 NDV for a head without gradient, frozen and trainable;
every row of keys and values read and written once. And what is not counted has to fit in what is left: predicted (as in
NOTES.md), the passes over the logits of a head of D=4096 take 3 to 5% of its time, those of one of D=2304 up to 8%.
Trainable log-probs per token form those logits again that do not fit the memory budget, so they have no goal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Goal:
    """About fastdpo's default in all parts of this family, mode and shape, in bfloat16."""

    what: str
    family: str
    mode: str | None
    share: float
    ceiling: str
    shape: Mapping[str, int] = field(default_factory=dict)

    def row(self, part: dict[str, Any]) -> dict[str, Any] | None:
        """fastdpo's figures in a part that the goal is about."""
        if part["family"] != self.family or part["dtype"] != "bfloat16" or not self.shape.items() <= part.items():
            return None
        return (part if self.mode is None else part["modes"][self.mode])["variants"]["fastdpo"]


COPY, PRODUCT = "a copy", "a large matrix product"
_D = {"d": 4096}

GOALS = (
    Goal("log-probs, forward", "logits", "no grad", 0.90, COPY),
    Goal("log-probs, forward and backward", "logits", "gradient", 0.90, COPY),
    Goal("loss from hidden states, no gradient", "dpo", "no grad", 0.93, PRODUCT, _D),
    Goal("loss from hidden states, frozen head", "dpo", "frozen head", 0.93, PRODUCT, _D),
    Goal("loss from hidden states, trainable head", "dpo", "trainable", 0.92, PRODUCT, _D),
    Goal("log-probs from hidden states, no gradient", "head", "no grad", 0.93, PRODUCT, _D),
    Goal("log-probs from hidden states, frozen head", "head", "frozen head", 0.93, PRODUCT, _D),
    Goal("gather of keys and values, there and back", "gather", None, 0.85, COPY),
)


def evaluate(
    device_type: str, parts: Iterable[dict[str, Any]], families: Iterable[str], goals: Iterable[Goal] = GOALS
) -> list[dict[str, Any]]:
    """Every goal of these families in every part that it is about; "not measured" also where numbers did not agree, and
    once for a goal without a part."""
    parts, families = list(parts), set(families)
    verdicts = []
    for goal in goals if device_type == "cuda" else ():
        if goal.family not in families:
            continue
        rows = [(_shape(part), row) for part in parts if (row := goal.row(part)) is not None]
        for shape, row in rows or [("", {})]:
            value = row.get("share_of_ceiling")
            verdict = "not measured" if value is None else "met" if value >= goal.share else "missed"
            verdicts.append({"goal": goal.what, "case": shape, "limit": goal.share, "at_least": True,
                             "ceiling": goal.ceiling, "value": value, "verdict": verdict})  # fmt: skip
    return verdicts


def _shape(part: dict[str, Any]) -> str:
    if part["family"] == "gather":
        return f"{part['group']}, {part['layout']}"
    return " ".join(f"{key.upper()}={part[key]}" for key in ("n", "d", "v") if key in part)


def line(verdict: dict[str, Any]) -> str:
    title = ", ".join(filter(None, (verdict["goal"], verdict["case"])))
    measured = "" if verdict["value"] is None else f", is {verdict['value']:.1%}"
    return f"goal {title}: at least {verdict['limit']:.0%} of {verdict['ceiling']}{measured}: {verdict['verdict']}"
