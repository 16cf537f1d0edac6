"""Names of options that scripts still carry and that transformers or TRL have dropped since.

Each is a field of the configs, so that parsers, files of options and copies know it. Set, it is carried over into the
option that has its meaning, with a FutureWarning that names that option, and is None again; where nothing has its
meaning any more, ValueError says what to write instead.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from transformers import TrainingArguments


@dataclass(frozen=True)
class OldName:
    """A dropped option.

    kind   type of its value
    carry  (config, value) -> what to write instead, after it has set that; raises ValueError where nothing can be set
    unset  its old default, with which nothing happens
    """

    kind: Any
    carry: Callable[[Any, Any], str]
    unset: Any = None


def _default_of(config: Any, name: str) -> Any:
    known = type(config).__dataclass_fields__[name]
    return known.default_factory() if callable(known.default_factory) else known.default


def _set(config: Any, new: str, value: Any) -> None:
    """Sets an option that is not set otherwise.

    Raises:
        ValueError: it has another value already.
    """
    held = getattr(config, new)
    if held not in (value, _default_of(config, new)):
        raise ValueError(f"{new} is {held!r}, and an older name of it says {value!r}; leave the older name out.")
    setattr(config, new, value)


def _renamed(new: str) -> Callable[[Any, Any], str]:
    def carry(config: Any, value: Any) -> str:
        _set(config, new, value)
        return f"write {new}={value!r}"

    return carry


def _no_effect(reason: str) -> Callable[[Any, Any], str]:
    return lambda config, value: f"it has no effect ({reason}); leave it out"


def _only(allowed: tuple[Any, ...], reason: str, remedy: str) -> Callable[[Any, Any], str]:
    """An option of which only values without effect are left."""

    def carry(config: Any, value: Any) -> str:
        if value not in allowed:
            raise ValueError(f"{reason}; {remedy}.")
        return f"it has no effect ({reason}); leave it out"

    return carry


def _off(reason: str, remedy: str) -> Callable[[Any, Any], str]:
    return _only((False, None, 0, "", []), reason, remedy)


def _warmup_ratio(config: Any, value: float) -> str:
    if not 0 <= value <= 1:
        raise ValueError("it must lie in [0, 1], and is called warmup_steps by now.")
    if config.warmup_steps:  # which has always had precedence
        return f"warmup_steps={config.warmup_steps} has precedence; leave it out"
    config.warmup_steps = math.nextafter(1.0, 0.0) if value == 1 else value  # from 1 on, it is a number of steps
    return f"write warmup_steps={config.warmup_steps} (below 1 it is a share of all steps)"


def _logging_dir(config: Any, value: str) -> str:
    os.environ["TENSORBOARD_LOGGING_DIR"] = value
    return f"set the environment variable TENSORBOARD_LOGGING_DIR={value}"


def _group_by_length(config: Any, value: bool) -> str:
    if not value:
        return "leave it out"
    return _renamed("train_sampling_strategy")(config, "group_by_length")


def _no_cuda(config: Any, value: bool) -> str:
    return _renamed("use_cpu")(config, True) if value else "leave it out"


def _adafactor(config: Any, value: bool) -> str:
    return _renamed("optim")(config, "adafactor") if value else "leave it out"


def _include_inputs(config: Any, value: bool) -> str:
    if value:
        config.include_for_metrics = [*config.include_for_metrics, "inputs"]
    return "write include_for_metrics=['inputs']" if value else "leave it out"


def _hub_model_id(config: Any, value: str) -> str:
    owner = config.push_to_hub_organization
    _set(config, "hub_model_id", f"{owner}/{value}" if owner else value)
    return f"write hub_model_id={config.hub_model_id!r}"


def _hub_organization(config: Any, value: str) -> str:
    if config.push_to_hub_model_id is None and (config.hub_model_id or "").split("/")[0] != value:
        name = config.hub_model_id or os.path.basename(os.path.abspath(config.output_dir or "trainer_output"))
        if "/" in name:
            raise ValueError(f"hub_model_id is {name!r}, which names another owner; leave the older name out.")
        config.hub_model_id = f"{value}/{name}"
    return "write hub_model_id='OWNER/MODEL'"


def _hub_token(config: Any, value: str) -> str:
    _set(config, "hub_token", value)
    return "write hub_token=..."


def _cuts_rows(remedy: str = "") -> Callable[[Any, Any], str]:
    def carry(config: Any, value: bool) -> str:
        if value:
            raise ValueError(f"it would cut packed rows apart; leave it out{remedy}.")
        return "leave it out"

    return carry


def _torchdynamo(config: Any, value: str) -> str:
    config.torch_compile = True
    return _renamed("torch_compile_backend")(config, value)


def _fsdp_entry(new: str) -> Callable[[Any, Any], str]:
    def carry(config: Any, value: Any) -> str:
        if not value:
            return "leave it out"
        given = config.fsdp_config
        if isinstance(given, str):
            raise ValueError(f"fsdp_config is a file; write {new} into it and leave this out.")
        config.fsdp_config = {**(given or {}), new: value}
        return f"write fsdp_config={{{new!r}: {value!r}}}"

    return carry


_APEX = "mixed precision is torch's own"

# Of transformers.TrainingArguments since 4.40.
_OF_TRANSFORMERS: dict[str, OldName] = {
    "warmup_ratio": OldName(float, _warmup_ratio),
    "evaluation_strategy": OldName(str, _renamed("eval_strategy")),
    "no_cuda": OldName(bool, _no_cuda),
    "use_mps_device": OldName(bool, _no_effect("a GPU of Apple's is used wherever there is one")),
    "per_gpu_train_batch_size": OldName(int, _renamed("per_device_train_batch_size")),
    "per_gpu_eval_batch_size": OldName(int, _renamed("per_device_eval_batch_size")),
    "overwrite_output_dir": OldName(bool, _no_effect("it was for scripts to read; train() writes into output_dir")),
    "save_safetensors": OldName(bool, _only((True,), "weights are always saved as safetensors", "leave it out"), True),
    "logging_dir": OldName(str, _logging_dir),
    "fp16_backend": OldName(str, _only(("auto", "amp", "cuda_amp"), _APEX, "leave it out and set fp16=True")),
    "half_precision_backend": OldName(str, _only(("auto", "amp", "cuda_amp"), _APEX, "leave it out and set fp16=True")),
    "fp16_opt_level": OldName(str, _only(("O0", "O1"), _APEX, "leave it out and set fp16=True")),
    "include_inputs_for_metrics": OldName(bool, _include_inputs),
    "push_to_hub_model_id": OldName(str, _hub_model_id),
    "push_to_hub_organization": OldName(str, _hub_organization),
    "push_to_hub_token": OldName(str, _hub_token),
    "dispatch_batches": OldName(bool, _cuts_rows()),
    "split_batches": OldName(bool, _cuts_rows(" and set per_device_train_batch_size to what each device is to take")),
    "group_by_length": OldName(bool, _group_by_length),
    "include_tokens_per_second": OldName(bool, _no_effect("perf/tokens_per_second is always logged")),
    "jit_mode_eval": OldName(bool, _off("evaluation runs the model as training does", "leave it out")),
    "use_ipex": OldName(bool, _off("transformers has dropped that package", "leave it out")),
    "ray_scope": OldName(str, _only(("last",), "it is an argument of the search", "pass scope=... to "
                                    "trainer.hyperparameter_search instead")),
    "mp_parameters": OldName(str, _off("SageMaker's model parallelism cuts packed rows apart", "leave it out")),
    "torchdynamo": OldName(str, _torchdynamo),
    "adafactor": OldName(bool, _adafactor),
    "past_index": OldName(int, _only((-1,), "rows carry no state from one to the next", "leave it out")),
    "use_legacy_prediction_loop": OldName(bool, _off("there is one loop", "leave it out")),
    "tpu_num_cores": OldName(int, _off("TPUs are not supported", "leave it out")),
    "tpu_metrics_debug": OldName(bool, _off("TPUs are not supported", "leave it out")),
    "fsdp_min_num_params": OldName(int, _fsdp_entry("min_num_params")),
    "fsdp_transformer_layer_cls_to_wrap": OldName(str, _fsdp_entry("transformer_layer_cls_to_wrap")),
    "sharded_ddp": OldName(str, _off("fairscale is superseded", "set fsdp and fsdp_config")),
    "tp_size": OldName(int, _only((0, 1), "a packed row and its head cannot be cut among processes", "use data "
                                  "parallelism (FSDP2 shards the weights)")),
}  # fmt: skip

_FORWARD = "log-probs are formed of completion tokens alone, always"

# Of TRL's configs.
_OF_TRL: dict[str, OldName] = {
    "label_pad_token_id": OldName(int, _only((-100,), "packed rows are not padded with labels", "leave it out")),
    "padding_value": OldName(int, _only((), "padding reaches no result", "leave it out")),
    "max_target_length": OldName(int, _renamed("max_completion_length")),
    "is_encoder_decoder": OldName(
        bool, _off("an encoder-decoder has no causal row to pack", "only decoders are supported; leave it out")
    ),
    "generate_during_eval": OldName(
        bool, _off("answers are shown by show_generations", "set show_generations to a number of prompts instead")
    ),
    "use_logits_to_keep": OldName(bool, _no_effect(_FORWARD)),
    "use_num_logits_to_keep": OldName(bool, _no_effect(_FORWARD)),
    "use_liger_loss": OldName(bool, _no_effect("head and loss are always fused")),
    "base_model_attribute_name": OldName(str, _no_effect("the backbone is found by itself")),
    "force_use_ref_model": OldName(bool, _no_effect("a ref_model that is passed is used, with PEFT, too")),
    "tools": OldName(
        list[str], _off("tools are written by the chat template", "write them into the prompts, by "
                  "tokenizer.apply_chat_template(messages, tools=..., tokenize=False)")
    ),
}  # fmt: skip

OLD_NAMES: dict[str, OldName] = {
    name: old for name, old in {**_OF_TRANSFORMERS, **_OF_TRL}.items()
    if name not in TrainingArguments.__dataclass_fields__
}  # fmt: skip


def _field(name: str, old: OldName) -> tuple[str, Any, Any]:
    """A switch is one on a command line, too, as it was."""
    switch = old.kind is bool
    default = bool(old.unset) if switch else None
    kind = bool if switch else old.kind | None
    return name, kind, field(default=default, repr=False, metadata={"help": "An older name."})


# The fields, for a config to inherit; those that a later class declares itself stay its own.
OldNames: Any = make_dataclass(
    "OldNames",
    [_field(name, old) for name, old in OLD_NAMES.items()],
    kw_only=True,
)
OldNames.__module__ = __name__


def carry_over(config: Any) -> None:
    """Moves what is set under older names to where it belongs.

    Raises:
        ValueError: for a name of which nothing has the meaning any more, or that contradicts the newer one.
    """
    for name, old in OLD_NAMES.items():
        value = getattr(config, name)
        if value is None or value == _default_of(config, name):
            continue
        try:
            instead = old.carry(config, value)
        except ValueError as error:
            raise ValueError(f"{name}={value!r} is not supported: {error}") from None
        setattr(config, name, _default_of(config, name))
        warnings.warn(f"{name} is an older name: {instead}.", FutureWarning, stacklevel=5)


def hidden_names(config: Any) -> set[str]:
    """The older names, which say nothing in a record of the options."""
    return {known.name for known in fields(config) if not known.repr}
