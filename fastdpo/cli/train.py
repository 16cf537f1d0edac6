"""fastdpo train, fastdpo demo."""

from __future__ import annotations

import argparse
from typing import Any

from fastdpo.cli.arguments import flag
from fastdpo.types import UserError

_TRAIN_EPILOG = """\
The data set is a .jsonl, .json or .parquet file (or a folder of them or of Dataset.save_to_disk, a hub name, or -) of
rows such as
  {"prompt": "...", "chosen": "...", "rejected": "..."}
or, for chat models, with lists of {"role": ..., "content": ...} in place of the texts.

Every other field of fastdpo.DPOConfig (which holds all of transformers.TrainingArguments) can be given as
--name value, for example --label_smoothing 0.1 --warmup_steps 10 --gradient_checkpointing false.

example:
  fastdpo train --model ./my-model --dataset pairs.jsonl --output_dir ./out --learning_rate 5e-6
"""


def add_commands(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model of yours on pairs of yours",
        description="DPO on a model and a file of preference pairs; prints before and after, saves model and picture.",
        epilog=_TRAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    data = train.add_argument_group("model and data")
    data.add_argument("--model", required=True, metavar="PATH", help="folder (or hub name) of a transformers causal LM")
    data.add_argument(
        "--dataset", required=True, metavar="DATA",
        help="preference pairs: .jsonl, .json or .parquet file, folder of them or of Dataset.save_to_disk, hub name, "
        "or - for JSON lines from standard input",
    )  # fmt: skip
    data.add_argument("--eval_dataset", metavar="DATA", help="held-out pairs, likewise; default: a tenth of --dataset")
    data.add_argument("--output_dir", required=True, metavar="DIR", help="where model, report.png and summary.json go")
    training = train.add_argument_group("training")
    training.add_argument("--beta", type=float, default=0.1, help="pull towards the reference (default 0.1)")
    training.add_argument(
        "--loss_type", default="sigmoid", help="a loss of pairs: sigmoid, ipo, simpo, ... (default sigmoid)"
    )
    training.add_argument("--learning_rate", type=float, default=1e-6, help="peak of the schedule (default 1e-6)")
    training.add_argument("--num_train_epochs", type=float, default=1.0, help="passes over the data (default 1)")
    training.add_argument("--max_steps", type=int, default=-1, help="optimizer steps, in place of epochs")
    training.add_argument(
        "--per_device_train_batch_size", type=int, default=8, metavar="B", help="pairs a batch (default 8)"
    )
    training.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, metavar="K", help="batches a step (default 1)"
    )
    training.add_argument("--max_length", type=int, default=1024, help="prompt + answer in tokens (default 1024)")
    training.add_argument("--seed", type=int, default=42, help="order of the data (default 42)")
    running = train.add_argument_group("running")
    running.add_argument(
        "--packing", default="auto", choices=("auto", "prefix", "varlen", "padded"),
        help="prefix: each prompt runs once; auto takes it where the model allows (default auto)",
    )  # fmt: skip
    running.add_argument("--ref_logps", metavar="DIR", help="reference cache; default: in the user's cache folder")
    running.add_argument(
        "--allow_pickle", type=flag, default=False, metavar="BOOL",
        help="load weights that are not safetensors, which can run code (default false)",
    )  # fmt: skip
    train.set_defaults(run=_train, takes_config=True, prog=train.prog)

    demo = commands.add_parser(
        "demo",
        help="watch a small real model change its mind",
        description="Trains SmolLM2-135M-Instruct to answer honestly that it is a program; minutes on two CPU cores.",
    )
    demo.add_argument("--output_dir", default="fastdpo-demo", metavar="DIR", help="default ./fastdpo-demo")
    demo.set_defaults(run=_demo, takes_config=False, prog=demo.prog)


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from fastdpo.run import check_model_path, check_output_dir, load_data, load_model, run

    # The cheap checks first: a wrong path should not cost a model load.
    data = load_data(options.dataset, options.eval_dataset)
    check_model_path(options.model, allow_pickle=options.allow_pickle)
    output = check_output_dir(options.output_dir)
    not_config = (
        "command",
        "run",
        "takes_config",
        "prog",
        "model",
        "allow_pickle",
        "dataset",
        "eval_dataset",
        "output_dir",
    )
    named = {name: value for name, value in vars(options).items() if name not in not_config}
    args = _config(str(output), named, rest)
    if args.model_init_kwargs:
        raise UserError("fastdpo train loads the model in float32 and has no --model_init_kwargs; train from Python.")
    model, tokenizer = load_model(
        options.model, "float32", allow_pickle=options.allow_pickle, trust_remote_code=args.trust_remote_code
    )
    run(model, tokenizer, data, args, title=f"fastdpo train: {options.model}")


def _demo(options: argparse.Namespace, rest: list[str]) -> None:
    from fastdpo.demo import HELD_OUT_FILE, MODEL_NAME, SETTINGS, TRAIN_FILE, prepare_model
    from fastdpo.run import check_output_dir, load_data, load_model, run

    data = load_data(TRAIN_FILE, HELD_OUT_FILE)
    output = check_output_dir(options.output_dir)
    folder = prepare_model()
    args = _config(str(output), SETTINGS, [])
    model, tokenizer = load_model(str(folder), "float32")
    run(model, tokenizer, data, args, title=f"fastdpo demo: {MODEL_NAME} learns to say that it is a program")


def _config(output_dir: str, named: dict[str, Any], rest: list[str]) -> Any:
    """A DPOConfig from the named options, then from --name value pairs of any other field."""
    import torch
    from transformers import HfArgumentParser

    from fastdpo.trainer import DPOConfig

    # What a command line should settle: references are computed once, and nothing is sent anywhere.
    defaults: dict[str, Any] = {
        "precompute_ref_log_probs": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    values = {**defaults, **{name: value for name, value in named.items() if value is not None}}
    given = [argument[2:].split("=")[0].replace("-", "_") for argument in rest if argument.startswith("--")]
    if {"reference_free", "sync_ref_model"} & set(given):  # there is nothing fixed to compute ahead
        values["precompute_ref_log_probs"] = False
    known = DPOConfig.__dataclass_fields__
    for name in given:
        if name not in known:
            raise UserError(
                f"--{name} is no option of fastdpo train and no field of DPOConfig; {_nearest(name, known)}"
            )
    try:
        if rest:
            parser = HfArgumentParser(DPOConfig, exit_on_error=False)
            # Not a config of these alone: an older name is only there until a config is made.
            parsed, unknown = parser.parse_known_args(["--output_dir", output_dir, *rest])
            if unknown:
                raise UserError(f"{unknown[0]!r} belongs to no option; see fastdpo train -h.")
            values |= {name: getattr(parsed, name) for name in given}
        return DPOConfig(output_dir=output_dir, **values)
    except (ValueError, argparse.ArgumentError) as error:
        raise UserError(" ".join(str(error).split())) from error


def _nearest(name: str, known: Any) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean --{near[0]}?" if near else "see fastdpo train -h."
