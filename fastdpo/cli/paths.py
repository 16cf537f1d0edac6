"""What the commands read and write: never the same, and never over another run without being asked to."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
from pathlib import Path
from typing import Any

from fastdpo.saving import WRITTEN, check_not_read, lies_in, run_in, same_place
from fastdpo.types import UserError

_CACHE = ("manifest.json", "shard-*.parquet", ".*.tmp")


def local_paths(name: str | None) -> list[str]:
    """Files and folders that a name stands for; none for the hub's, for standard input, and for what is not there."""
    if not name or name == "-":
        return []
    if os.path.exists(name):
        return [name]
    return sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else []


def check_data_path(name: str | None, split: str | None) -> None:
    """That there is something to read, as far as it shows without reading it."""
    from fastdpo.data import open_rows
    from fastdpo.data.read import is_hub_name

    if name is not None and (os.path.exists(name) or not is_hub_name(name)):
        open_rows(name, split=split)


def inputs_of(options: Any, *names: str) -> dict[str, list[str]]:
    return {f"--{name}": local_paths(getattr(options, name, None)) for name in names}


def check_output_dir_is_no_input(options: Any) -> None:
    """Of fastdpo train."""
    inputs = inputs_of(options, "model", "dataset", "eval_dataset", "ref_logps")
    check_not_read("--output_dir", options.output_dir, inputs, writes=WRITTEN)


def check_precompute(options: Any) -> None:
    """That neither the cache nor the rows with columns are written over model or data, or over each other."""
    inputs = inputs_of(options, "model", "adapter", "dataset")
    if options.output:
        check_not_read("--output", options.output, inputs, writes=_CACHE)
    if not options.columns:
        return
    check_not_read("--columns", options.columns, inputs, writes=())
    if os.path.isdir(options.columns):
        raise UserError(f"--columns {options.columns} is a folder; name a .jsonl file.")
    if glob.has_magic(options.dataset) and fnmatch.fnmatch(
        os.path.realpath(options.columns), os.path.realpath(options.dataset)
    ):
        raise UserError(
            f"--columns {options.columns} is a file that --dataset {options.dataset} reads; name another file."
        )
    name = os.path.basename(options.columns)
    if not options.output:
        return
    if lies_in(options.columns, options.output) and any(fnmatch.fnmatchcase(name, each) for each in _CACHE):
        raise UserError(f"--columns {options.columns} is a file of the cache {options.output}; name another file.")
    if same_place(options.columns, options.output):
        raise UserError(f"--columns {options.columns} is the folder of --output; name another file.")


def check_is_free(folder: str, *, overwrite: bool, resume: str | None) -> None:
    """That an output folder holds no other run, or that the command line says what to do with it.

    Raises:
        UserError: it holds one.
    """
    if overwrite and resume:
        raise UserError("--overwrite true and --resume_from_checkpoint contradict each other; leave one of them out.")
    found = run_in(Path(folder))
    if found is None or overwrite or (resume is not None and (resume == "true" or lies_in(resume, folder))):
        return
    raise UserError(
        f"{folder} holds {found} already; go on with --resume_from_checkpoint true, write over it with --overwrite "
        "true, or name another --output_dir."
    )


def is_demo(folder: str) -> bool:
    """Whether what a folder holds is an earlier result of fastdpo demo, which may be written over."""
    try:
        title = json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))["title"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return isinstance(title, str) and title.startswith("fastdpo demo")


def checkpoint_of(given: str | None, output_dir: str) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` (true, false or a path) names.

    Raises:
        UserError: there is none.
    """
    if given is None or given == "false":
        return None
    if given != "true":
        if not os.path.isdir(given):
            raise UserError(f"{given}: there is no such checkpoint folder; give --resume_from_checkpoint true for the "
                            f"newest of {output_dir}, or another path.")  # fmt: skip
        return given
    from fastdpo.trainer.run_state import newest_checkpoint

    newest = newest_checkpoint(Path(output_dir))
    if newest is None:
        raise UserError(f"{output_dir} holds no whole checkpoint to go on from; leave --resume_from_checkpoint out.")
    return newest
