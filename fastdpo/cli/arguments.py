"""Types of command-line arguments."""

from __future__ import annotations

import argparse
import re


def flag(text: str) -> bool:
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; it must be above 0")
    return int(text)


def length(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of tokens (2 or more), and not none")
    return int(text)


def shard(text: str) -> tuple[int, int]:
    """(index from 0, count) of "I/N"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no slice; give I/N with I from 1 to N, 3/16 for instance")
    return int(match[1]) - 1, int(match[2])
