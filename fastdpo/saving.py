"""Files of an output folder: written beside what is there, then put in its place; what is an input is not touched."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastdpo.types import UserError

_BESIDE = ".saving"
_WEIGHTS = (
    "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_*",
)  # fmt: skip
_MODEL = (
    *_WEIGHTS, "config.json", "generation_config.json", "tokenizer*", "vocab.*", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "spiece.model", "chat_template*", "training_args.bin",
)  # fmt: skip
_RUN = ("summary.json", "report.png")
_IN_PLACE = ("README.md", "nan_rows.jsonl", "generations.jsonl")  # which are not replaced but written to
# What a run may write into its folder.
WRITTEN = (*_MODEL, *_RUN, *_IN_PLACE, "checkpoint-*", _BESIDE)


@contextlib.contextmanager
def replacing(folder: Path, *, first: bool = True) -> Iterator[Path]:
    """A folder to write into, whose files take the place of those in `folder` once all of them are written.

    first: whether this process is the one, of several that save together, which makes the folder and moves the files.
    """
    beside = folder / _BESIDE
    if first:
        shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True, exist_ok=True)
    try:
        yield beside
        if first:
            for path in sorted(beside.iterdir()):
                target = folder / path.name
                if path.is_dir():
                    shutil.rmtree(target, ignore_errors=True)
                os.replace(path, target)
    finally:
        if first:
            shutil.rmtree(beside, ignore_errors=True)


def drop_other_weights(folder: Path, kept: set[str]) -> None:
    """Deletes weights of an older model, which loading would take, or take in addition."""
    for path in _matching(folder, _WEIGHTS):
        if path.name not in kept:
            path.unlink()


def drop_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        if not re.fullmatch(r"checkpoint-\d+", path.name):
            continue
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def part_links(folder: Path) -> None:
    """Gives files that a run writes to in place a content of their own, where they are links to another file."""
    for path in _matching(folder, _IN_PLACE):
        if path.is_symlink() or path.stat().st_nlink > 1:
            with replacing(folder) as beside:
                shutil.copyfile(path, beside / path.name)


def run_in(folder: Path) -> str | None:
    """What a folder holds of an earlier run or of a model, in words; None: nothing."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    if checkpoints:
        return f"checkpoints ({max(checkpoints, key=lambda path: int(path.name[11:])).name})"
    found = _matching(folder, (*_WEIGHTS, "config.json", *_RUN))
    if not found:
        return None
    return "a model" if any(path.name not in _RUN for path in found) else f"a run's {found[0].name}"


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    if not folder.is_dir():
        return []
    names = [name for name in sorted(os.listdir(folder)) if any(fnmatch.fnmatchcase(name, each) for each in patterns)]
    return [folder / name for name in names if (folder / name).is_file()]


# Inputs


def same_place(one: str | Path, other: str | Path) -> bool:
    """Whether two paths, however they are spelt, lead to one file or folder; also where there is none yet."""
    with contextlib.suppress(OSError):
        if os.path.samefile(one, other):
            return True
    return os.path.realpath(one) == os.path.realpath(other)


def lies_in(path: str | Path, folder: str | Path) -> bool:
    """Whether a path lies somewhere beneath a folder, links followed."""
    if not os.path.isdir(folder):
        return False
    return any(same_place(parent, folder) for parent in Path(os.path.realpath(path)).parents)


def check_not_read(option: str, output: str | Path, inputs: dict[str, list[str]], *, writes: tuple[str, ...]) -> None:
    """That writing to an output cannot change what is read.

    Args:
        inputs: the local paths that each option names.
        writes: patterns of the names that are written in the folder `output`; none: it is a file.

    Raises:
        UserError: the output is an input, lies in one, or would write over one that lies in it.
    """
    for name, paths in inputs.items():
        for path in paths:
            if same_place(output, path):
                raise UserError(f"{option} {output} is what {name} reads ({path}); it would be written over: name "
                                f"another path with {option}.")  # fmt: skip
            if lies_in(output, path):
                raise UserError(f"{option} {output} lies in {path}, which {name} reads; name a path outside of it with "
                                f"{option}.")  # fmt: skip
            over = _written_over(output, path, writes)
            if over is not None:
                raise UserError(f"{option} {output} would write over {over}, which {name} reads ({path}); name another "
                                f"folder with {option}.")  # fmt: skip


def _written_over(folder: str | Path, path: str, writes: tuple[str, ...]) -> Path | None:
    if not os.path.isdir(folder):
        return None
    if lies_in(path, folder):
        inner = os.path.relpath(os.path.realpath(path), os.path.realpath(folder)).split(os.sep)[0]
        if any(fnmatch.fnmatchcase(inner, each) for each in writes):
            return Path(folder, inner)
    # Another name of the same file, which is written to in place.
    for own in _matching(Path(folder), tuple(each for each in _IN_PLACE if each in writes)):
        if same_place(own, path):
            return own
    return None


# Errors


def disk_error(error: BaseException) -> str | None:
    """What the system says of a file that could not be written; None of an error of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if type(error).__name__ == "SafetensorError":
        return text
    signs = ("PytorchStreamWriter", "unexpected pos", "No space left", "file write failed", "iostream")
    return text if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs) else None
