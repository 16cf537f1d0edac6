"""The model to be trained: loaded, with adapters, and what of it cannot be trained this way refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer
from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled

from fastdpo.adapters import adapter_wrappers
from fastdpo.models import check_architecture, check_no_encoder_decoder, unwrapped, vocabulary_size
from fastdpo.types import UserError

logger = logging.getLogger(__name__)

# Initialisations of LoRA that change the base weights: without its adapter the model is not what it was.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "eva")


def load(model: Any, args: Any, quantization_config: Any = None, *, auto_class: Any = AutoModelForCausalLM) -> Any:
    """A model as it is, or loaded from a name or path with `args.model_init_kwargs`.

    Raises:
        ValueError: keywords of loading for a model that is loaded; an encoder-decoder or, in place of a causal language
            model, an encoder, which the config tells before any weights are read.
    """
    check = check_architecture if auto_class is AutoModelForCausalLM else check_no_encoder_decoder
    keywords = with_dtype(args.model_init_kwargs) if isinstance(args.model_init_kwargs, dict) else {}
    if not isinstance(model, str):
        for name, value in (("quantization_config", quantization_config), ("model_init_kwargs", keywords or None)):
            if value is not None:
                raise ValueError(f"{name} is for a model given by name; load this one so, or pass its name.")
        _check_loaded(model, check)
        return model
    if quantization_config is not None and "quantization_config" in keywords:
        raise ValueError("quantization_config is given twice, also in model_init_kwargs; leave one of them out.")
    options: dict[str, Any] = {"dtype": "float32", "trust_remote_code": args.trust_remote_code} | keywords
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    config = _checked_config(model, options, check)
    with _whole_weights():
        return _loader(auto_class, config).from_pretrained(model, **options)


def _loader(auto_class: Any, config: Any) -> Any:
    """`auto_class`, or, of a vision-language model, the class that loads it whole: it trains on text as others do."""
    from transformers.models.auto import modeling_auto as known

    kind = getattr(config, "model_type", None)
    if auto_class is not AutoModelForCausalLM or kind in known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return auto_class
    return AutoModelForImageTextToText if kind in known.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else auto_class


def _check_loaded(model: Any, check: Any) -> None:
    inner = unwrapped(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if hasattr(inner, "config"):
        name = type(inner).__name__
        check(inner.config, name, *([name] if check is check_architecture else []))


def _checked_config(path: str, options: dict[str, Any], check: Any) -> Any:
    """The model's config, which `check` passes; None where none can be had: loading says why."""
    wanted = ("trust_remote_code", "revision", "subfolder", "token", "cache_dir", "local_files_only")
    try:
        config = options.get("config")
        if not hasattr(config, "model_type"):
            config = AutoConfig.from_pretrained(path, **{name: options[name] for name in wanted if name in options})
    except (OSError, ValueError, KeyError):
        return None
    check(config, path)
    return config


def with_dtype(keywords: dict[str, Any]) -> dict[str, Any]:
    """Keywords of loading with `dtype` as a torch.dtype or "auto", where it stands there or as the older `torch_dtype`.

    Raises:
        ValueError: both stand there, and differ; or it is none.
    """
    given = {name: _dtype(name, keywords[name]) for name in ("dtype", "torch_dtype") if keywords.get(name) is not None}
    if len(set(given.values())) > 1:
        raise ValueError(
            f"model_init_kwargs has dtype={keywords['dtype']!r} and torch_dtype={keywords['torch_dtype']!r}, its older "
            "name; leave torch_dtype out."
        )
    rest = {name: value for name, value in keywords.items() if name not in ("dtype", "torch_dtype")}
    return rest | ({"dtype": next(iter(given.values()))} if given else {})


def _dtype(name: str, value: Any) -> Any:
    dtype = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if value == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return value if value == "auto" else dtype
    raise ValueError(
        f"model_init_kwargs has {name}={value!r}; it must be 'auto' or a floating-point dtype, as 'bfloat16' or "
        "torch.bfloat16."
    )


@contextmanager
def _whole_weights() -> Iterator[None]:
    """Within it, ZeRO-3 does not part weights as they are loaded: the model is checked, and its reference computed,
    before DeepSpeed shards it."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    held = deepspeed._hf_deepspeed_config_weak_ref()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed.set_hf_deepspeed_config(held)


def with_adapter(model: Any, peft_config: Any) -> Any:
    """The model wrapped in a new PEFT adapter.

    Raises:
        ValueError: it has adapters already; `peft_config` is no PEFT config.
    """
    from peft import PeftConfig, PeftModel, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise ValueError(f"peft_config is {type(peft_config).__name__}; it must be a peft config, as peft.LoraConfig.")
    if isinstance(model, PeftModel):
        raise ValueError(
            "the model has adapters, and peft_config would put one more on it; leave peft_config out to train "
            "those, or merge them (model.merge_and_unload()) and pass the merged model."
        )
    return get_peft_model(model, peft_config)


def check_adapters(model: Any, inner: Any) -> None:
    """That log-probs from hidden states and head weight are those of the model with its adapters.

    Raises:
        ValueError: an adapter on the head, or one that puts virtual tokens before each row.
    """
    if not hasattr(model, "peft_config"):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise UserError(
                f"the adapter {name!r} ({config.peft_type.value}) puts virtual tokens before every sequence, which "
                "packed rows and cached references have no place for; take LoRA or another adapter of weights."
            )
    if isinstance(inner.get_output_embeddings(), BaseTunerLayer):
        raise UserError(
            "there is an adapter on the model's head, and log-probs come from the head's own weight, so it would not "
            "be trained; leave the head out of target_modules, or train it whole with modules_to_save=['lm_head']."
        )


def changes_base(peft_config: Any) -> bool:
    """Whether putting on such an adapter changes the weights beneath it."""
    start = getattr(peft_config, "init_lora_weights", None)
    return isinstance(start, str) and start.lower().startswith(_CHANGES_BASE)


def base_is_the_start(model: Any) -> bool:
    """Whether a PEFT model is known to compute what its base does with adapters off: LoRA that has learnt nothing."""
    if any(map(changes_base, model.peft_config.values())):
        return False
    found = [_learnt_nothing(wrapper) for _, wrapper in adapter_wrappers(model)]
    return bool(found) and all(found)


def _learnt_nothing(wrapper: Any) -> bool:
    """Whether what PEFT has put in the place of a module is known to do what the module does."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    if isinstance(wrapper, ModulesToSaveWrapper):
        before = wrapper.original_module.state_dict()
        return all(_same(copied.state_dict(), before) for copied in wrapper.modules_to_save.values())
    if isinstance(wrapper, TrainableTokensWrapper):
        return _learnt_nothing(wrapper.token_adapter)
    if isinstance(wrapper, TrainableTokensLayer):
        weight = wrapper.get_base_layer().weight
        return all(
            torch.equal(weight[wrapper.token_indices[name]], values.to(weight))
            for name, values in wrapper.trainable_tokens_delta.items()
        )
    if not isinstance(wrapper, LoraLayer) or wrapper.merged:
        return False
    seconds = [*wrapper.lora_B.parameters(), *wrapper.lora_embedding_B.parameters()]
    return bool(seconds) and not any(bool(value.any()) for value in seconds) and _norms_kept(wrapper)


def _same(values: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    return values.keys() == others.keys() and all(
        torch.equal(value, others[name].to(value.device)) for name, value in values.items()
    )


def _norms_kept(wrapper: Any) -> bool:
    """Whether the magnitudes of DoRA, where a layer has them, are still the norms of its weight."""
    from peft.utils.integrations import dequantize_module_weight

    for magnitude in wrapper.lora_magnitude_vector.values():
        weight = dequantize_module_weight(wrapper.get_base_layer()).detach()
        own = magnitude.weight.detach()
        dim = 0 if wrapper.lora_embedding_B else 1
        norms = torch.linalg.norm(weight.to(own.dtype), dim=dim)
        if norms.numel() != own.numel() or not torch.allclose(norms.to(own.device), own.flatten(), rtol=1e-5):
            return False
    return True


def prepare_tokenizer(processing_class: Any, inner: Any, args: Any) -> Any:
    """The tokenizer, with a padding token, which the model's configs then name, too.

    Raises:
        UserError: none can be loaded, or it has no token to pad with that the model has an embedding for.
    """
    if processing_class is None:
        name = inner.config._name_or_path
        try:
            processing_class = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        except (OSError, ValueError) as error:
            raise UserError(
                f"no tokenizer was passed, and none can be loaded from {name!r}; pass processing_class=..."
            ) from error
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    wanted = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    if wanted is None:
        raise UserError("the tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token.")
    if wanted not in tokenizer.get_vocab():
        raise UserError(f"pad_token is {wanted!r}, which the tokenizer does not know; name one of its tokens.")
    tokenizer.pad_token = wanted
    _check_tokenizer(tokenizer, vocabulary_size(inner))
    inner.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(inner, "generation_config", None) is not None:
        inner.generation_config.pad_token_id = tokenizer.pad_token_id
    return processing_class


def _check_tokenizer(tokenizer: Any, size: int) -> None:
    """Its other tokens matter where rows hold them, which is looked at when these are prepared."""
    remedy = "take the tokenizer of this model, or call model.resize_token_embeddings(len(tokenizer))"
    if tokenizer.pad_token_id >= size:
        raise UserError(
            f"the padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, and the model has "
            f"embeddings for {size} tokens, 0 to {size - 1}; set pad_token to one of these, {remedy}."
        )
    if len(tokenizer) > size:
        logger.warning(
            "The tokenizer knows %d tokens, and the model has embeddings for %d: rows with one beyond them are "
            "refused. If any should be trained, %s.", len(tokenizer), size, remedy,
        )  # fmt: skip


def disable_dropout(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (not every module has it)
