"""The command `fastdpo`.

What a user can cause (options, data, files, a full disk, too little memory, a package that is missing) is one sentence
on stderr and exit code 2. Anything else is a fault of fastdpo's: it says so, keeps the traceback, exit code 1. Where it
is told to stop the exit code is 128 and the signal's number.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from fastdpo.cli import cache, precompute, train
from fastdpo.cli.arguments import Parser, check_given_once
from fastdpo.types import DamageWarning, UserError

_DESCRIPTION = "Preference training (DPO) of causal language models, fast and exact."
_EPILOG = """\
--traceback with any command, or FASTDPO_TRACEBACK=1, shows where in the code an error arose.
"""
_OUT_OF_MEMORY = (
    "out of memory ({reason}); lower --per_device_train_batch_size, --max_tokens_per_microbatch, --max_tokens or "
    "--max_length, or set --gradient_checkpointing true."
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    show = "--traceback" in arguments or os.environ.get("FASTDPO_TRACEBACK", "0") not in ("", "0")
    arguments = [word for word in arguments if word != "--traceback"]
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show_warning, warnings.showwarning)
        return _run(arguments, show)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastdpo", description=_DESCRIPTION, epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for part in (train, precompute, cache):
        part.add_commands(commands)
    return parser


def _run(arguments: list[str], show: bool) -> int:
    try:
        parser = _parser()
        options, rest = parser.parse_known_args(arguments)
        if options.command is None:
            if rest:
                raise UserError(f"fastdpo does not know {rest[0]}; see fastdpo -h.")
            parser.print_help()
            return 0
        check_given_once(arguments)
        if rest and not options.takes_config:
            raise UserError(f"{options.prog} does not know {rest[0]}; see {options.prog} -h.")
        options.arguments = arguments
        return options.run(options, rest) or 0
    except KeyboardInterrupt as error:
        _say(str(error) or "interrupted", error, show)
        return int(getattr(error, "code", 130))
    except BrokenPipeError:  # the reader of what is printed has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        said = _users_mistake(error)
        if said is None:
            return _own_fault(error, arguments, show)
        _say(said, error, show)
        return 2


def _users_mistake(error: Exception) -> str | None:
    """What to say of an error that is none of fastdpo's faults; None: it is one."""
    if isinstance(error, UserError) or type(error).__name__ == "NotFiniteError":
        return str(error)
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return _OUT_OF_MEMORY.format(reason=reason)
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # of the CPU
        return _OUT_OF_MEMORY.format(reason=reason)
    if isinstance(error, ImportError) and not (error.name or "").startswith("fastdpo"):
        return f"a package is missing: {reason}"
    if type(error).__module__.split(".")[0] in ("httpx", "httpcore", "requests", "huggingface_hub"):
        return f"the network or the hub failed: {reason}"
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else reason
    return None


def _own_fault(error: Exception, arguments: list[str], show: bool) -> int:
    what = f"internal error in fastdpo {arguments[0] if arguments else ''}: {type(error).__name__}: {error}"
    if show:
        _say(f"{what}; please report it with this traceback.", error, show)
        return 1
    try:
        with tempfile.NamedTemporaryFile("w", prefix="fastdpo-traceback-", suffix=".txt", delete=False) as file:
            file.write(f"fastdpo {' '.join(arguments)}\n\n")
            traceback.print_exception(error, file=file)
        where = f"with the traceback in {file.name}"
    except OSError:
        where = "with the traceback that --traceback shows"
    _say(f"{what}; please report it, {where}.", error, show)
    return 1


def _say(text: str, error: BaseException, show: bool) -> None:
    if show:
        traceback.print_exception(error)
    print("fastdpo: " + re.sub(r"\s*\n\s*", " ", text.strip()), file=sys.stderr)


def _show_warning(others: Any, message: Any, category: type[Warning], *place: Any, **options: Any) -> None:
    """Our own in one line, without the place in the code."""
    if issubclass(category, DamageWarning):
        print(f"fastdpo: {message}", file=sys.stderr)
    else:
        others(message, category, *place, **options)
