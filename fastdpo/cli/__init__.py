"""The command `fastdpo`. A mistake of the user's gives one sentence on stderr and exit code 2, without a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastdpo.cli import cache, precompute, train
from fastdpo.types import UserError

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
