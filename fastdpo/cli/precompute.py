"""fastdpo precompute."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from fastdpo.cli.arguments import count, flag, length, shard
from fastdpo.types import UserError

_PATIENCE = timedelta(days=30)  # processes that are done wait for the slowest
_DTYPES = ("float32", "bfloat16", "float16")
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
    add = parser.add_argument_group("model and data").add_argument
    add("--model", required=True, metavar="PATH", help="folder (or hub name) of a transformers causal LM")
    add("--adapter", metavar="PATH", help="folder of a PEFT adapter to put on it")
    add("--dataset", required=True, metavar="DATA", help=".jsonl, .json or .parquet file, folder of them or of "
        "Dataset.save_to_disk, hub name, or - for JSON lines from standard input")  # fmt: skip
    add("--split", metavar="NAME", help="of a data set with several (default train)")
    add("--streaming", type=flag, default=False, metavar="BOOL", help="read a hub data set as it arrives")
    add("--output", metavar="DIR", help="the cache; default: the model's folder in the user's cache")
    add = parser.add_argument_group("what is computed").add_argument
    add("--max_length", type=length, default=1024, metavar="N",
        help="prompt + answer in tokens, or none; as in training (default 1024)")  # fmt: skip
    add("--truncation_mode", default="keep_start", choices=("keep_start", "keep_end"), help="default keep_start")
    add("--dtype", default="float32", choices=_DTYPES,
        help="of the weights, as the trainer will load them (default float32, with --bf16)")  # fmt: skip
    add("--bf16", type=flag, metavar="BOOL",
        help="arithmetic in bfloat16 (autocast); default, as in training: where a GPU has it")  # fmt: skip
    add("--sums_only", type=flag, default=False, metavar="BOOL", help="keep no values of each token (default false)")
    add("--columns", metavar="FILE",
        help="write the rows to this .jsonl file, too, with ref_chosen_logps and ref_rejected_logps")  # fmt: skip
    add = parser.add_argument_group("running").add_argument
    add("--shard", type=shard, default=(0, 1), metavar="I/N", help="only the I-th of N slices, I from 1 to N")
    add("--max_tokens", type=count, metavar="N", help="tokens a forward pass; default by device")
    add("--batch_size", type=count, metavar="N", help="prompts a forward pass at most")
    add("--packing", default="auto", choices=("auto", "prefix", "varlen", "padded"), help="default auto")
    add("--attention_backend", default="auto", metavar="NAME", help="default auto")
    add("--allow_pickle", type=flag, default=False, metavar="BOOL",
        help="load weights that are not safetensors, which can run code (default false)")  # fmt: skip
    parser.set_defaults(run=_precompute, takes_config=False, prog=parser.prog)


def _precompute(options: argparse.Namespace, rest: list[str]) -> None:
    import torch

    from fastdpo.data import open_rows
    from fastdpo.reference import ReferenceCache, fill_cache, model_fingerprint
    from fastdpo.reference.cache import default_cache_dir
    from fastdpo.reference.fill import about
    from fastdpo.run import check_model_path, check_output_dir, load_model

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is computed is written, then the process ends
    rank, world, local = (int(os.environ.get(name, default)) for name, default in _PROCESS)
    # The cheap checks first: a wrong path or row should not cost a model load.
    check_model_path(options.model, allow_pickle=options.allow_pickle)
    if options.adapter:
        check_model_path(options.adapter, "--adapter", options.allow_pickle)
    if options.output:
        check_output_dir(options.output, "--output")
    rows = open_rows(options.dataset, split=options.split, streaming=options.streaming)
    if rows.stream and options.columns:
        raise UserError(
            f"--columns reads the rows a second time, and {rows.name} comes once; write it to a file first."
        )
    num_rows = rows.check()
    model, tokenizer = load_model(
        options.model, options.dtype, adapter=options.adapter, allow_pickle=options.allow_pickle
    )
    if torch.cuda.is_available():
        model.to(torch.device("cuda", local % torch.cuda.device_count()))
    autocast_dtype = torch.bfloat16 if _bf16(options) else None
    fingerprint = model_fingerprint(model, autocast_dtype)
    cache = ReferenceCache(
        options.output or default_cache_dir(fingerprint),
        fingerprint,
        per_token=False if options.sums_only else None,
        about=about(model),
    )
    index, slices = options.shard
    filled = fill_cache(
        model,
        (row for _, row in (rows if num_rows is None else rows.unchecked())),
        cache,
        tokenizer=tokenizer,
        max_length=options.max_length,
        truncation_mode=options.truncation_mode,
        max_tokens=options.max_tokens,
        batch_size=options.batch_size,
        packing=options.packing,
        attention_backend=options.attention_backend,
        autocast_dtype=autocast_dtype,
        num_shards=slices * world,
        shard_index=index * world + rank,
        num_rows=num_rows,
        progress=rank == 0,
    )
    if world > 1:
        filled = _wait_for_all(filled)
        cache.reload()
    if options.columns and rank == 0:
        _write_columns(options, rows, cache, tokenizer)
    if rank == 0:
        print(_summary(filled, cache, index, slices))


_PROCESS = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))


def _bf16(options: argparse.Namespace) -> bool:
    from transformers.utils import is_torch_bf16_gpu_available

    if options.bf16 is not None:
        return bool(options.bf16)
    return options.dtype == "float32" and is_torch_bf16_gpu_available()


def _wait_for_all(filled: Any) -> Any:
    """What all processes together did. They wait for each other here, and nowhere else."""
    import torch.distributed as dist

    from fastdpo.trainer.passes import HostCounts

    dist.init_process_group("gloo", timeout=_PATIENCE)
    everyone = HostCounts().gather([filled.sequences, filled.found, filled.computed, filled.tokens])
    dist.destroy_process_group()
    sequences, found, computed, tokens = map(sum, zip(*everyone, strict=True))
    return replace(filled, sequences=sequences, found=found, computed=computed, tokens=tokens)


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
