"""The options of `fastdpo train`: a DPOConfig whose values have been looked at before anything is loaded."""

from __future__ import annotations

import math
from typing import Any

from fastdpo.types import UserError

# What a command line should settle: references are computed once, nothing is sent anywhere, and a run that is killed
# has lost a tenth of its steps at most.
_DEFAULTS: dict[str, Any] = {
    "precompute_ref_log_probs": True,
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 0.1,
    "save_total_limit": 2,
    "logging_steps": 1,
}

_ANY = (-math.inf, math.inf, "")
_POSITIVE = (math.nextafter(0.0, 1.0), math.inf, "above 0")
_NOT_NEGATIVE = (0.0, math.inf, "not below 0")
_COUNT = (1, math.inf, "at least 1")
_SHARE = (0.0, 1.0, "in [0, 1]")
_DECAY = (0.0, math.nextafter(1.0, 0.0), "in [0, 1)")
_SEED = (0, 2**32 - 1, "in [0, 4294967295]")
# Bounds of numbers, and how to say them; what is not here must be finite.
_BOUNDS: dict[str, tuple[float, float, str]] = {
    "learning_rate": _POSITIVE,
    "num_train_epochs": _POSITIVE,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "seed": _SEED,
    "data_seed": _SEED,
    "warmup_steps": _NOT_NEGATIVE,
    "warmup_ratio": _SHARE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_beta1": _DECAY,
    "adam_beta2": _DECAY,
    "adam_epsilon": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "label_smoothing_factor": _DECAY,
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "eval_accumulation_steps": _COUNT,
    "save_total_limit": _COUNT,
    "torch_empty_cache_steps": _COUNT,
    "dataloader_num_workers": (0, 1024, "in [0, 1024]"),
    "dataloader_prefetch_factor": _COUNT,
    "dataset_num_proc": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
    "precompute_ref_batch_size": _COUNT,
    "ref_model_sync_steps": _COUNT,
    "ref_model_mixup_alpha": _SHARE,
    "show_generations": _NOT_NEGATIVE,
    "pad_to_multiple_of": _COUNT,
}


def config(output_dir: str, named: dict[str, Any], rest: list[str]) -> Any:
    """A DPOConfig from the named options, then from --name value pairs of any other field.

    Raises:
        UserError: an option that is not known, whose value cannot be, or that needs what is not installed.
    """
    import torch

    from fastdpo.trainer import DPOConfig

    others = _parsed(rest, DPOConfig)
    values = {**_DEFAULTS, "dataloader_pin_memory": torch.cuda.is_available(), **named, **others}
    if {"reference_free", "sync_ref_model"} & set(others):  # there is nothing fixed to compute ahead
        values["precompute_ref_log_probs"] = others.get("precompute_ref_log_probs", False)
    _evaluate_where_it_saves(values, others)
    check_numbers(values)
    try:
        args = DPOConfig(output_dir=output_dir, **values)
    except Exception as error:  # of transformers, accelerate and torch, each in its own way
        raise UserError(" ".join(str(error).split()) or type(error).__name__) from error
    check_packages(args)
    return args


def _parsed(rest: list[str], config_class: Any) -> dict[str, Any]:
    """Values of the fields that are given as --name value or --name=value."""
    from transformers import HfArgumentParser

    class Parser(HfArgumentParser):
        def error(self, message: str) -> Any:
            raise UserError(f"{message.removeprefix('argument ')}; see fastdpo train -h.")

    if not rest:
        return {}
    known = config_class.__dataclass_fields__
    given = [argument[2:].split("=")[0].replace("-", "_") for argument in rest if argument.startswith("--")]
    for name in given:
        if name not in known:
            raise UserError(
                f"--{name} is no option of fastdpo train and no field of DPOConfig; {_nearest(name, known)}"
            )
    parsed, remaining = Parser(config_class, allow_abbrev=False).parse_known_args(rest)
    if remaining:
        raise UserError(f"fastdpo train does not know {remaining[0]}; see fastdpo train -h.")
    return {name: getattr(parsed, name) for name in given}


def _nearest(name: str, known: Any) -> str:
    import difflib

    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean --{near[0]}?" if near else "see fastdpo train -h."


def _evaluate_where_it_saves(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Evaluation in training happens as often as checkpoints are written, where nothing else is said."""
    strategy = str(getattr(given.get("eval_strategy"), "value", given.get("eval_strategy", "no")))
    if strategy == "steps" and "eval_steps" not in given:
        values["eval_steps"] = given.get("save_steps", _DEFAULTS["save_steps"])
    if given.get("load_best_model_at_end") and "save_strategy" not in given and strategy != "no":
        values["save_strategy"] = strategy
        if "save_steps" not in given and "eval_steps" in values:
            values["save_steps"] = values["eval_steps"]


def check_numbers(values: dict[str, Any]) -> None:
    """That numbers are finite and within their bounds; what transformers lets pass ends in the middle of a run.

    Raises:
        UserError: the first that is not, and what it must be.
    """
    for name, value in values.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            low, high, must = _BOUNDS.get(name, _ANY)
            if not math.isfinite(number):
                raise UserError(f"--{name} is {number}; it must be a finite number{', ' if must else ''}{must}.")
            if not low <= number <= high:
                raise UserError(f"--{name} is {number}; it must be {must}.")
    steps = values.get("max_steps", -1)
    if steps != -1 and steps < 1:
        raise UserError(f"--max_steps is {steps}; it must be at least 1, or -1 for as many as the epochs take.")
    for name in ("logging_steps", "save_steps", "eval_steps"):
        number = values.get(name)
        if number is not None and number > 1 and number != int(number):
            raise UserError(f"--{name} is {number}; it must be a whole number of steps, or a share of them below 1.")


def check_packages(args: Any) -> None:
    """That what options need is there: packages, a login, other processes.

    Raises:
        UserError: what is missing, and for which option.
    """
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.utils import is_liger_kernel_available

    try:
        for tracker in get_reporting_integration_callbacks(args.report_to):
            tracker()
    except Exception as error:  # RuntimeError, ImportError, ValueError; trackers of their own
        raise UserError(f"--report_to {' '.join(args.report_to)}: {' '.join(str(error).split())}") from error
    if args.fsdp and args.world_size == 1:
        raise UserError("--fsdp shards a model over several processes, and this is one; start the command by "
                        "`accelerate launch --no_python` or torchrun, or leave the option out.")  # fmt: skip
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise UserError("--use_liger_kernel needs the package liger-kernel; install it or leave the option out.")
    if args.push_to_hub:
        from huggingface_hub import get_token

        if args.hub_token is None and get_token() is None:
            raise UserError("--push_to_hub needs a login to the hub; run `hf auth login`, or give --hub_token.")
