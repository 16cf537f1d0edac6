"""Names that scripts use: of folders, and of arguments that are called otherwise by now."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from fastdpo.trainer.config import PreferenceConfig


def default_output_dir(model: Any, method: str) -> str:
    """As TRL names it: the model and the method."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
    return f"{name.rstrip('/').split('/')[-1]}-{method}"


def named_tokenizer(processing_class: Any, tokenizer: Any) -> Any:
    """`processing_class`, or the older `tokenizer`, with a warning."""
    if tokenizer is None:
        return processing_class
    if processing_class is not None:
        raise ValueError("tokenizer is the older name of processing_class, and both are given; leave tokenizer out.")
    warnings.warn("tokenizer is deprecated: pass it as processing_class.", FutureWarning, stacklevel=3)
    return tokenizer


# Arguments of older trainers that are no options.
_NO_MEANING = {"preprocess_logits_for_metrics": "it has no logits to work on, for none are formed"}


def config_of(
    args: Any, kind: type[PreferenceConfig], model: Any, method: str, options: Mapping[str, Any]
) -> PreferenceConfig:
    """The config of a trainer: its own, or one made of TrainingArguments, with options that were passed beside it.

    Args:
        options: what older scripts pass to the trainer itself (`beta`, `max_length`), which are fields of the config.

    Raises:
        TypeError: an option that is no field.
        ValueError: another trainer's config, or an option that `args` sets otherwise.
    """
    known = kind.__dataclass_fields__
    options = {name: value for name, value in options.items() if name not in _NO_MEANING or value is not None}
    for name in options:
        if name in _NO_MEANING:
            raise ValueError(f"{name} is not supported: {_NO_MEANING[name]}; leave it out.")
        if name not in known:
            raise TypeError(f"{method}Trainer.__init__() got an unexpected keyword argument {name!r}")
    if args is None:
        args = kind(output_dir=default_output_dir(model, method))
    elif not isinstance(args, kind):
        args = _converted(args, kind, method)
    given = {name: value for name, value in options.items() if value != getattr(args, name)}
    for name, value in options.items():
        warnings.warn(
            f"{name} as an argument of {method}Trainer is deprecated: "
            f"write args={kind.__name__}(..., {name}={value!r}).",
            FutureWarning, stacklevel=4,
        )  # fmt: skip
        if name in given and getattr(args, name) != _default(known[name]):
            raise ValueError(
                f"{name} is {value!r} as an argument of the trainer and {getattr(args, name)!r} in args; set it in "
                "args alone."
            )
    return dataclasses.replace(args, **given) if given else args


def _converted(args: Any, kind: type[PreferenceConfig], method: str) -> PreferenceConfig:
    """From TrainingArguments, or TRL's config of the same method, which have the same names."""
    if not isinstance(args, TrainingArguments) or isinstance(args, PreferenceConfig):
        raise ValueError(f"args is {type(args).__name__}; {method}Trainer takes {kind.__name__}.")
    values = {each.name: getattr(args, each.name) for each in dataclasses.fields(args) if each.init}
    defaults = {each.name: _default(each) for each in dataclasses.fields(args)}
    own = {name: value for name, value in values.items() if name in kind.__dataclass_fields__}
    lost = [name for name, value in values.items() if name not in own and value != defaults[name]]
    if lost:
        raise ValueError(
            f"args is {type(args).__name__} with {lost[0]}={values[lost[0]]!r}, which {kind.__name__} has not; pass "
            f"{kind.__name__}."
        )
    return kind(**own)


def _default(field: Any) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
