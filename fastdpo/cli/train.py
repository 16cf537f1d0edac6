"""fastdpo train, fastdpo demo."""

from __future__ import annotations

import argparse
import shlex
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdpo.cli.arguments import flag, length, resume
from fastdpo.types import UserError

if TYPE_CHECKING:
    from fastdpo.run import Progress
    from fastdpo.stopping import Signals

# The options of the command itself that are fields of DPOConfig.
_FIELDS = (
    "beta", "loss_type", "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "seed", "packing", "ref_logps",
)  # fmt: skip

_TRAIN_EPILOG = """\
The data set is a .jsonl, .json or .parquet file (or a folder of them or of Dataset.save_to_disk, a hub name, or -) of
rows such as
  {"prompt": "...", "chosen": "...", "rejected": "..."}
or, for chat models, with lists of {"role": ..., "content": ...} in place of the texts.

A tenth of the way and again at every further tenth, a checkpoint is written to the output folder (--save_steps,
--save_total_limit, --save_strategy no); a run that was stopped goes on with --resume_from_checkpoint true.

Every other field of fastdpo.DPOConfig (which holds all of transformers.TrainingArguments) can be given as
--name value, for example --label_smoothing 0.1 --warmup_steps 10 --gradient_checkpointing false.

example:
  fastdpo train --model ./my-model --dataset pairs.jsonl --output_dir ./out --learning_rate 5e-6
"""


def add_commands(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model of yours on pairs of yours",
        usage="fastdpo train --model PATH --dataset DATA --output_dir DIR [options]",
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
    data.add_argument("--split", metavar="NAME", help="of a data set with several (default train)")
    data.add_argument("--eval_dataset", metavar="DATA", help="held-out pairs, likewise; default: those of a tenth of "
        "the prompts of --dataset, which are not trained on")  # fmt: skip
    data.add_argument("--eval_split", metavar="NAME", help="of --eval_dataset (default train)")
    data.add_argument("--output_dir", required=True, metavar="DIR", help="where model, report.png and summary.json go")
    data.add_argument("--overwrite", type=flag, default=False, metavar="BOOL",
        help="write over another run in --output_dir (default false)")  # fmt: skip
    data.add_argument("--resume_from_checkpoint", type=resume, metavar="true|PATH",
        help="go on from the newest checkpoint in --output_dir, or from this one")  # fmt: skip
    training = train.add_argument_group("training")
    training.add_argument("--beta", type=float, default=0.1, help="pull towards the reference (default 0.1)")
    training.add_argument(
        "--loss_type", default=["sigmoid"], nargs="+", metavar="NAME",
        help="losses of pairs: sigmoid, ipo, simpo, ... (default sigmoid)",
    )  # fmt: skip
    training.add_argument("--learning_rate", type=float, default=1e-6, help="peak of the schedule (default 1e-6)")
    training.add_argument("--num_train_epochs", type=float, default=1.0, help="passes over the data (default 1)")
    training.add_argument("--max_steps", type=int, default=-1, help="optimizer steps, in place of epochs")
    training.add_argument(
        "--per_device_train_batch_size", type=int, default=8, metavar="B", help="pairs a batch (default 8)"
    )
    training.add_argument(
        "--gradient_accumulation_steps", type=int, default=1, metavar="K", help="batches a step (default 1)"
    )
    training.add_argument("--max_length", type=length, default=1024, metavar="N",
        help="prompt + answer in tokens, or none (default 1024)")  # fmt: skip
    training.add_argument("--seed", type=int, default=42, help="order of the data (default 42)")
    running = train.add_argument_group("running")
    running.add_argument(
        "--packing", default="auto", choices=("auto", "prefix", "varlen", "padded"),
        help="prefix: each prompt runs once; auto takes it where the model allows (default auto)",
    )  # fmt: skip
    running.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"),
        help="of the weights; bfloat16 loses small updates (default float32)")  # fmt: skip
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
    demo.add_argument("--overwrite", type=flag, default=False, metavar="BOOL",
        help="write over another run; an earlier demo is written over anyway (default false)")  # fmt: skip
    demo.set_defaults(run=_demo, takes_config=False, prog=demo.prog)


def _train(options: argparse.Namespace, rest: list[str]) -> None:
    from fastdpo.cli.options import config
    from fastdpo.cli.paths import check_data_path, check_is_free, check_output_dir_is_no_input, checkpoint_of
    from fastdpo.run import check_model_path, check_output_dir, load_data, load_model, run

    def go(signals: Signals, progress: Progress) -> None:
        # The cheap checks first: a wrong path should not cost a model load.
        check_data_path(options.dataset, options.split)
        check_data_path(options.eval_dataset, options.eval_split)
        check_model_path(options.model, allow_pickle=options.allow_pickle)
        check_output_dir_is_no_input(options)
        resume = options.resume_from_checkpoint
        check_is_free(options.output_dir, overwrite=options.overwrite, resume=None if resume == "false" else resume)
        args = config(options.output_dir, _named(options), rest)
        args.resume_from_checkpoint = checkpoint_of(resume, options.output_dir)
        if args.model_init_kwargs:
            raise UserError(
                "fastdpo train loads the model as --dtype says and has no --model_init_kwargs; train from Python."
            )
        if args.resume_from_checkpoint:
            from fastdpo.trainer.command_trainer import check_whole

            check_whole(Path(args.resume_from_checkpoint))
        data = load_data(options.dataset, options.eval_dataset, split=options.split, eval_split=options.eval_split)
        check_output_dir(options.output_dir)
        model, tokenizer = load_model(
            options.model, options.dtype, allow_pickle=options.allow_pickle, trust_remote_code=args.trust_remote_code
        )
        run(
            model, tokenizer, data, args, title=f"fastdpo train: {options.model}", signals=signals, progress=progress,
            overwrite=options.overwrite,
        )  # fmt: skip

    _interruptible(go, options.output_dir, _go_on(options.arguments))


def _demo(options: argparse.Namespace, rest: list[str]) -> None:
    from fastdpo.cli.options import config
    from fastdpo.cli.paths import check_is_free, is_demo
    from fastdpo.demo import HELD_OUT_FILE, MODEL_NAME, SETTINGS, TRAIN_FILE, prepare_model
    from fastdpo.run import check_output_dir, load_data, load_model, run
    from fastdpo.saving import WRITTEN, check_not_read

    def go(signals: Signals, progress: Progress) -> None:
        # An earlier demo is written over without being asked: it is made again in minutes.
        overwrite = options.overwrite or is_demo(options.output_dir)
        check_is_free(options.output_dir, overwrite=overwrite, resume=None)
        data = load_data(TRAIN_FILE, HELD_OUT_FILE)
        output = check_output_dir(options.output_dir)
        folder = prepare_model()
        check_not_read("--output_dir", output, {"the demo": [str(folder)]}, writes=WRITTEN)
        args = config(str(output), SETTINGS, [])
        model, tokenizer = load_model(str(folder), "float32")
        title = f"fastdpo demo: {MODEL_NAME} learns to say that it is a program"
        run(
            model, tokenizer, data, args, title=title, signals=signals, progress=progress,
            overwrite=overwrite,
        )  # fmt: skip

    _interruptible(go, options.output_dir, None)


def _named(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of DPOConfig among the options of the command itself."""
    named = {name: getattr(options, name) for name in _FIELDS if getattr(options, name) is not None}
    named["max_length"] = options.max_length  # of which None is a value
    if options.dtype != "float32" and "bf16" not in named:
        named["bf16"] = False  # as fastdpo precompute computes the references of such a model
    return named


def _interruptible(go: Callable[[Signals, Progress], None], output_dir: str, go_on: str | None) -> None:
    """Runs `go`, and says what there is and how to go on where it is told to stop, or the disk is full."""
    from fastdpo.run import Progress
    from fastdpo.stopping import Interrupted, Signals

    signals, progress = Signals(), Progress()
    with signals.listening():
        try:
            go(signals, progress)
        except KeyboardInterrupt as stop:
            code = getattr(stop, "code", 128 + signal.SIGINT)
            raise Interrupted(f"interrupted {_what_is_there(progress.stage, output_dir, go_on)}", code) from stop
        except SystemExit as stop:  # of the trainer, which has been told by SIGTERM
            if stop.code != 128 + signal.SIGTERM:
                raise
            what = _what_is_there(progress.stage, output_dir, go_on)
            raise Interrupted(f"interrupted {what}", 128 + signal.SIGTERM) from stop
        except UserError as error:
            if type(error).__name__ != "CannotSave":
                raise
            raise UserError(f"{error}, {_what_is_there(progress.stage, output_dir, go_on)}") from error


def _what_is_there(stage: str, output_dir: str, go_on: str | None) -> str:
    if stage == "saved":
        return f"after training: the trained model is in {output_dir}; only what was measured after it is missing"
    if stage == "before":
        return "before training; give the same command again"
    from fastdpo.trainer.run_state import newest_checkpoint

    newest = newest_checkpoint(Path(output_dir))
    if newest is None or go_on is None:
        return f"before there was a checkpoint in {output_dir}; what was in it before is still there: train again"
    return f"with {newest} as the newest checkpoint; go on with: {go_on}"


def _go_on(arguments: Sequence[str]) -> str:
    """The command line that resumes what this one began."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--overwrite", "--resume_from_checkpoint"):
            next(words, None)
        elif not word.startswith(("--overwrite=", "--resume_from_checkpoint=")):
            kept.append(word)
    return shlex.join(["fastdpo", *kept, "--resume_from_checkpoint", "true"])
