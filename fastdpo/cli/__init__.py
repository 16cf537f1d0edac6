"""The command `fastdpo`. A mistake of the user's gives one sentence on stderr and exit code 2, without a traceback."""

from __future__ import annotations

import argparse
import functools
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from fastdpo.cli import cache, precompute, train
from fastdpo.types import DamageWarning, UserError

_DESCRIPTION = "Preference training (DPO) of causal language models, fast and exact."


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastdpo", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for part in (train, precompute, cache):
        part.add_commands(commands)
    options, rest = parser.parse_known_args(argv)
    if options.command is None:
        parser.print_help()
        return 0
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
        return _run(options, rest)


def _run(options: argparse.Namespace, rest: list[str]) -> int:
    try:
        if rest and not options.takes_config:
            raise UserError(f"{options.prog} does not know {rest[0]}; see {options.prog} -h.")
        return options.run(options, rest) or 0
    except UserError as error:
        print(f"fastdpo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastdpo: interrupted", file=sys.stderr)
        return 130


def _show_warning(others: Any, message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
    """Our own in one line, without the place in the code."""
    if issubclass(category, DamageWarning):
        print(f"fastdpo: {message}", file=sys.stderr)
    else:
        others(message, category, *place, **options)
