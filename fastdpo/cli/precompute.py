"""fastdpo precompute."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastdpo.cli.arguments import count, flag, shard
from fastdpo.cli.paths import check_precompute
from fastdpo.cli.reference_model import add_data_arguments, add_model_arguments, check_model, load_reference
from fastdpo.types import UserError

_EPILOG = """\
What is in the folder already is not computed again: the command may be killed and given again, with more rows, fewer
rows, or rows in another order. Then: fastdpo train --ref_logps DIR, or DPOConfig(ref_logps="DIR").

Many processes: `accelerate launch --no_python fastdpo precompute ...`, or `torchrun --no-python`. Many machines that do
not know each other: --shard 1/16 on the first, --shard 2/16 on the second, and so on; then copy all files into one
folder, or `fastdpo cache merge`.

example:
  fastdpo precompute --model ./my-model --dataset pairs.jsonl --output ./reference
"""


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "precompute",
        help="log-probs of a reference model, once, kept on disk",
        description="Computes the log-probs of all answers under a reference model and keeps them by content.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    group = parser.add_argument_group("model and data")
    add_model_arguments(group)
    add_data_arguments(group)
    add = parser.add_argument_group("what is computed").add_argument
    add("--output", metavar="DIR", help="the cache; default: the model's folder in the user's cache")
    add("--sums_only", type=flag, default=False, metavar="BOOL", help="keep no values of each token (default false)")
    add("--columns", metavar="FILE",
        help="write the rows to this .jsonl file, too, with ref_chosen_logps and ref_rejected_logps")  # fmt: skip
    add = parser.add_argument_group("running").add_argument
    add("--shard", type=shard, default=(0, 1), metavar="I/N", help="only the I-th of N slices, I from 1 to N")
    add("--max_tokens", type=count, metavar="N", help="tokens a forward pass; default by device")
    add("--batch_size", type=count, metavar="N", help="prompts a forward pass at most")
    add("--packing", default="auto", choices=("auto", "prefix", "varlen", "padded"), help="default auto")
    add("--attention_backend", default="auto", metavar="NAME",
        help="auto, flash_attn, torch_varlen, flex or sdpa (default auto)")  # fmt: skip
    parser.set_defaults(run=_precompute, takes_config=False, prog=parser.prog)


def _precompute(options: argparse.Namespace, rest: list[str]) -> None:
    from fastdpo.data import open_rows
    from fastdpo.reference import ReferenceCache, fill_cache, model_fingerprint
    from fastdpo.reference.cache import default_cache_dir
    from fastdpo.reference.fill import about
    from fastdpo.reference.folder import MANIFEST
    from fastdpo.run import check_output_dir

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is computed is written, then the process ends
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_model(options)
    check_precompute(options)
    if options.output and not Path(options.output, MANIFEST).exists():  # one that is there may have all that is wanted
        check_output_dir(options.output, "--output")
    rows = open_rows(options.dataset, split=options.split, streaming=options.streaming)
    if rows.once and options.columns:
        raise UserError(f"--columns reads the rows twice, and {rows.name} comes once; write it to a file first.")
    index, slices = options.shard
    if slices > 1 and options.columns:
        raise UserError("--columns needs what all slices compute; merge their folders, and give it without --shard.")
    if world > 1 and rows.once:
        raise UserError(f"{world} processes would each get some rows of {rows.name}; write it to a file and give that.")
    if options.columns:
        check_output_dir(Path(options.columns).parent, "--columns")
    num_rows = rows.check()
    reference = load_reference(options)
    fingerprint = model_fingerprint(reference.model, reference.autocast_dtype)
    cache = ReferenceCache(
        options.output or default_cache_dir(fingerprint),
        fingerprint,
        per_token=False if options.sums_only else None,
        about=about(reference.model),
    )
    filled = fill_cache(
        reference.model,
        (row for _, row in (rows if num_rows is None else rows.unchecked())),
        cache,
        tokenizer=reference.tokenizer,
        max_length=options.max_length,
        truncation_mode=options.truncation_mode,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        packing=options.packing,
        attention_backend=options.attention_backend,
        autocast_dtype=reference.autocast_dtype,
        num_shards=slices * world,
        shard_index=index + slices * rank,  # in slice `index` of `slices`, however many processes work on the others
        num_rows=num_rows,
        progress=rank == 0,
    )
    if world > 1:
        filled = _wait_for_all(filled)
        cache.reload()
    if options.columns and rank == 0:
        _write_columns(options, rows, cache, reference.tokenizer)
    if rank == 0:
        print(_summary(filled, cache, index, slices))


def _wait_for_all(filled: Any) -> Any:
    """What all processes together did. They wait for each other here, and nowhere else."""
    import torch.distributed as dist

    from fastdpo.trainer.passes import PATIENCE, HostCounts

    dist.init_process_group("gloo", timeout=PATIENCE)
    own = [filled.sequences, filled.found, filled.computed, filled.tokens, round(filled.seconds * 1000)]
    everyone = HostCounts().gather(own)
    dist.destroy_process_group()
    *counts, milliseconds = zip(*everyone, strict=True)
    sequences, found, computed, tokens = map(sum, counts)
    return replace(
        filled, sequences=sequences, found=found, computed=computed, tokens=tokens, seconds=max(milliseconds) / 1000
    )


def _write_columns(options: argparse.Namespace, rows: Any, cache: Any, tokenizer: Any) -> None:
    """The rows with their sums, a line each; whole or not at all."""
    from fastdpo.reference import reference_columns

    path = Path(options.columns)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for some in _batches((row for _, row in rows.unchecked()), 1024):
                columns = reference_columns(
                    cache, some, options.max_length, options.truncation_mode, tokenizer=tokenizer
                )
                for row, *sums in zip(some, *columns.values(), strict=True):
                    file.write(json.dumps({**row, **dict(zip(columns, sums, strict=True))}, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    except TypeError as error:  # a table may hold dates or bytes
        raise UserError(f"{path} cannot be written as JSON: {error}; leave that column out of the data set.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error}); name another file.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while some := list(itertools.islice(items, size)):
        yield some


def _summary(filled: Any, cache: Any, index: int, slices: int) -> str:
    speed = filled.tokens / max(1e-9, filled.seconds)
    which = f", slice {index + 1} of {slices}" if slices > 1 else ""
    return "\n".join(
        (
            f"rows        {filled.rows:,}{which}",
            f"sequences   {filled.sequences:,}: {filled.found:,} found, {filled.computed:,} computed",
            f"time        {filled.seconds:,.1f} s, {speed:,.0f} tokens/s",
            f"cache       {cache.path}: {len(cache):,} sequences",
        )
    )
