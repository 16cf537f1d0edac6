"""What fastdpo means to reach, and whether it did: the one table of goals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    what: str
    family: str
    mode: str
    shape: dict[str, int]
    limit_ms: float
    source: str
    device: str = "H200"  # part of the name of the devices that it is meant for
    variant: str = "fastdpo"
    dtype: str = "bfloat16"

    def concerns(self, part: dict[str, Any]) -> bool:
        return part["family"] == self.family and part["dtype"] == self.dtype and self.shape.items() <= part.items()


_LOGITS = {"n": 16384, "v": 128256}
_HEAD = {"n": 4096, "d": 4096, "v": 128256}
_COPY = "0.9 of a copy's 4.3 TB/s"
_QUACK = "quack's linear cross-entropy on an H200, by the docstring of Liger's: 17.33 ms for 6NDV"

GOALS = (
    Goal("token_logps, forward", "logits", "no grad", _LOGITS, 1.09, f"{_COPY} for one read"),
    Goal("token_logps, forward and backward", "logits", "gradient", _LOGITS, 3.25, f"{_COPY} for two reads, one write"),
    Goal("linear_loss, trainable head", "dpo", "trainable", _HEAD, 17.3, _QUACK),
    Goal("linear_loss, frozen head", "dpo", "frozen head", _HEAD, 11.5, f"two thirds of it, 4NDV ({_QUACK})"),
    Goal("linear_loss, no grad", "dpo", "no grad", _HEAD, 5.8, f"one third of it, 2NDV ({_QUACK})"),
)


def evaluate(device: str, parts: Iterable[dict[str, Any]], goals: Iterable[Goal] = GOALS) -> list[dict[str, Any]]:
    """Every goal for this device with what was measured; "not measured" also where the numbers did not agree."""
    verdicts = []
    parts = list(parts)
    for goal in goals:
        if goal.device not in device:
            continue
        rows = [part["modes"][goal.mode]["variants"][goal.variant] for part in parts if goal.concerns(part)]
        measured = next((row["ms"] for row in rows if row["ms"] is not None), None)
        verdict = "not measured" if measured is None else "met" if measured <= goal.limit_ms else "missed"
        verdicts.append({"goal": goal.what, "shape": goal.shape, "limit_ms": goal.limit_ms, "ms": measured,
                         "verdict": verdict, "source": goal.source})  # fmt: skip
    return verdicts


def line(verdict: dict[str, Any]) -> str:
    shape = " ".join(f"{key.upper()}={value}" for key, value in verdict["shape"].items())
    measured = "-" if verdict["ms"] is None else f"{verdict['ms']:.2f} ms"
    return f"goal {verdict['goal']}, {shape}: at most {verdict['limit_ms']} ms, is {measured}: {verdict['verdict']}"
