"""Types of command-line arguments."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from fastdpo.types import UserError


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


def resume(text: str) -> str:
    """ "true", "false", or a path."""
    try:
        return "true" if flag(text) else "false"
    except argparse.ArgumentTypeError:
        return text


def shard(text: str) -> tuple[int, int]:
    """(index from 0, count) of "I/N"."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is no slice; give I/N with I from 1 to N, 3/16 for instance")
    return int(match[1]) - 1, int(match[2])


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print its usage and end the process."""

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): ", r"\1: ", message)
        raise UserError(f"{message}; see {self.prog} -h.")


def check_given_once(arguments: Sequence[str]) -> None:
    """That no option is given twice: the first would be dropped without a word."""
    names = [word.split("=")[0] for word in arguments if re.match(r"--[A-Za-z]", word)]
    twice = [name for place, name in enumerate(names) if _plain(name) in map(_plain, names[:place])]
    if twice:
        raise UserError(f"{twice[0]} is given twice; give it once.")


def _plain(name: str) -> str:
    return name.replace("-", "_")
