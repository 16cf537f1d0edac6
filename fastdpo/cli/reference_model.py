"""The reference model and the data of `fastdpo precompute` and `fastdpo cache verify`: arguments, checks, loading."""

from __future__ import annotations

import argparse
import os
from typing import Any, NamedTuple

from fastdpo.cli.arguments import flag, length

_DTYPES = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: Any, required: bool = True) -> None:
    add = parser.add_argument
    add("--model", required=required, metavar="PATH", help="folder (or hub name) of a transformers causal LM")
    add("--adapter", metavar="PATH", help="folder of a PEFT adapter to put on it")
    add("--dtype", default="float32", choices=_DTYPES,
        help="of the weights, as the trainer will load them (default float32, with --bf16)")  # fmt: skip
    add("--bf16", type=flag, metavar="BOOL",
        help="arithmetic in bfloat16 (autocast); default, as in training: where a GPU has it")  # fmt: skip
    add("--allow_pickle", type=flag, default=False, metavar="BOOL",
        help="load weights that are not safetensors, which can run code (default false)")  # fmt: skip


def add_data_arguments(parser: Any, required: bool = True) -> None:
    add = parser.add_argument
    add("--dataset", required=required, metavar="DATA", help=".jsonl, .json or .parquet file, folder of them or of "
        "Dataset.save_to_disk, hub name, or - for JSON lines from standard input")  # fmt: skip
    add("--split", metavar="NAME", help="of a data set with several (default train)")
    add("--streaming", type=flag, default=False, metavar="BOOL", help="read a hub data set as it arrives")
    add("--max_length", type=length, default=1024, metavar="N",
        help="prompt + answer in tokens, or none; as in training (default 1024)")  # fmt: skip
    add("--truncation_mode", default="keep_start", choices=("keep_start", "keep_end"), help="default keep_start")


def check_model(options: argparse.Namespace) -> None:
    """The cheap checks: a wrong path should not cost a model load."""
    from fastdpo.run import check_model_path

    check_model_path(options.model, allow_pickle=options.allow_pickle)
    if options.adapter:
        check_model_path(options.adapter, "--adapter", options.allow_pickle)


class Reference(NamedTuple):
    model: Any
    tokenizer: Any
    autocast_dtype: Any


def load_reference(options: argparse.Namespace) -> Reference:
    """The model on its device: the GPU of this process, where there are GPUs."""
    import torch

    from fastdpo.run import load_model

    model, tokenizer = load_model(
        options.model, options.dtype, adapter=options.adapter, allow_pickle=options.allow_pickle
    )
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        model.to("cuda")
    return Reference(model, tokenizer, torch.bfloat16 if _bf16(options) else None)


def _bf16(options: argparse.Namespace) -> bool:
    from transformers.utils import is_torch_bf16_gpu_available

    if options.bf16 is not None:
        return bool(options.bf16)
    return options.dtype == "float32" and is_torch_bf16_gpu_available()
