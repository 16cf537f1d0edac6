"""What makes reference log-probs comparable: the model that gave them. And the key of a sequence."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdpo.adapters import adapter_tensors, adapter_wrappers, place
from fastdpo.models import causal_lm, restore_weights, unwrapped
from fastdpo.reference.unsaved import Unsaved, adapter_state, quantization, refuse_hooks
from fastdpo.types import UserError

_CHUNK = 1 << 24  # elements that are hashed at a time
_GLANCE = 1 << 12  # elements that mostly tell whether a chunk holds values of bfloat16

# Fields of a config without a bearing on log-probs: where it came from, how weights are drawn, what only training or
# generation looks at.
_IRRELEVANT = re.compile(
    r"_name_or_path|transformers_version|architectures|auto_map|(torch_)?dtype|.*_token_ids?|.*dropout.*|.*pdrop|"
    r"layerdrop|initializer_.*|init_std|init_device|use_cache|output_(attentions|hidden_states|router_logits|scores)|"
    r"return_dict|.*aux_loss_coef|input_jitter_noise|"
    r"(id2label|label2id|problem_type|task_specific_params|num_labels|summary_.*|pretraining_tp|chunk_size_feed_forward)"
)
# The same of an adapter's config; which layers it sits on, its tensors' names say.
_IRRELEVANT_TO_ADAPTER = re.compile(
    r"base_model_name_or_path|revision|inference_mode|task_type|auto_mapping|peft_version|.*dropout.*|init_.*|"
    r"bias|runtime_config|loftq_config|megatron_config|(target_modules|exclude_modules|modules_to_save|target_parameters|layers_to_transform|layers_pattern)"
)


def model_fingerprint(model: Any, compute_dtype: torch.dtype | None = None) -> dict[str, str]:
    """{"weights", "adapter", "config", "dtype"}: of two models with the same one, log-probs differ by rounding alone.

    weights   hash of all parameters and saved buffers by value: that of a bfloat16 checkpoint is the same in float32
    adapter   hash of the PEFT adapters that are switched on, "none" without: a model whose adapters are switched off
              has the fingerprint of the model that they were put on
    config    hash of what the config says of the forward pass; of values that differ from the defaults alone, so that
              a new field in a new version of transformers changes nothing
    dtype     of the weights, and in which the arithmetic is done where that is another one (`compute_dtype`: autocast)

    And further parts of a model that is not what its config makes of its weights:

    buffers       hash of the tensors that no checkpoint holds, rotary frequencies rounded to bfloat16, say
    attributes    hash of what was changed on its modules, a scale for instance, or of other modules in their place
    quantization  of 4- and 8-bit layers that compute otherwise than the config says

    Neither paths nor the tokenizer are part of it.

    Raises:
        UserError: adapters that put tokens of their own before the prompt, or that are merged and switched off;
            weights that are not in memory; somebody's hooks that change what the model computes.
    """
    inner = causal_lm(model)
    _refuse_prompt_learning(model)
    refuse_hooks(model)
    restore_weights(inner)
    parts = _Tensors(inner)
    unsaved = Unsaved(inner, parts.saved)
    with ThreadPoolExecutor(_num_threads()) as threads:
        weights = _digest_tensors(parts.base, threads)
        adapter = _digest_tensors(parts.adapter, threads)
        buffers = _digest_tensors(unsaved.buffers, threads)
    config = getattr(inner, "config", None)
    whole = {
        "weights": weights,
        "adapter": _hash(adapter + _adapter_config(model) + adapter_state(inner)) if parts.adapter else "none",
        "config": _hash(_relevant(_config_values(config), _IRRELEVANT)),
        "dtype": _dtype_name(inner, compute_dtype),
    }
    # Only where there is something to say, so that folders of older versions remain those of ordinary models.
    quantized = quantization(inner, compute_dtype or inner.get_input_embeddings().weight.dtype)
    if unsaved.buffers:
        whole["buffers"] = f"{_named(unsaved.buffers)} {buffers}"
    if unsaved.attributes:
        whole["attributes"] = f"{_named(unsaved.attributes)} {_hash(*sorted(unsaved.attributes))}"
    if quantized:
        whole["quantization"] = ", ".join(quantized)
    return whole


def sequence_key(prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> bytes:
    """128-bit hash of a prompt and a completion; the length of the prompt marks the border between them."""
    prompt = np.asarray(prompt_ids, dtype="<i8").tobytes()
    completion = np.asarray(completion_ids, dtype="<i8").tobytes()
    return hashlib.blake2b(len(prompt).to_bytes(8, "little") + prompt + completion, digest_size=16).digest()


class _Tensors:
    """The tensors of a model by name, those of adapters apart; names are those of the model without adapters."""

    def __init__(self, model: Any) -> None:
        self.base: dict[str, Tensor] = {}
        self.adapter: dict[str, Tensor] = {}
        wrappers = dict(_wrappers(model))
        saved = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
        self.saved = set(saved)
        # Adapters, too, have tensors that are not saved: projections that they draw again, say.
        others = {name: value for name, _, _, value in adapter_tensors(model) if name not in saved}
        for name, tensor in (saved | others).items():
            plain, wrapper, inside = place(name, wrappers)
            if wrapper is None:
                self.base[plain] = tensor
            elif not wrapper.disable_adapters:
                on = [adapter for adapter in wrapper.active_adapters if adapter in inside]
                if on:
                    inside.remove(on[0])  # what an adapter is called has no bearing
                    self.adapter[".".join([plain, str(wrapper.active_adapters.index(on[0])), *inside])] = tensor


def _wrappers(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in adapter_wrappers(model):
        if getattr(module, "merged", False) and module.disable_adapters:
            raise UserError(
                f"the adapter is merged into {name} and switched off, and will be taken out of it on the first "
                "pass; call unmerge_adapter() on the model before."
            )
        yield name, module


def _adapter_config(model: Any) -> str:
    """What the configs of the adapters in use say of the forward pass, r and alpha for instance; no defaults."""
    model = unwrapped(model)
    if not hasattr(model, "peft_config"):
        return ""
    names = model.active_adapters() if callable(model.active_adapters) else model.active_adapters
    texts = []
    for config in (model.peft_config[name] for name in names):
        defaults = type(config)().to_dict()
        values = {
            k: v for k, v in config.to_dict().items() if k == "peft_type" or k not in defaults or v != defaults[k]
        }
        texts.append(_relevant(values, _IRRELEVANT_TO_ADAPTER))
    return "".join(texts)


def _refuse_prompt_learning(model: Any) -> None:
    model = unwrapped(model)
    config = getattr(model, "active_peft_config", None)
    if config is not None and config.is_prompt_learning and not getattr(model, "_adapters_disabled", False):
        raise UserError(
            f"the adapter puts tokens of its own before the prompt ({config.peft_type.value}), which packed log-probs "
            "do not know; use an adapter on the weights, LoRA for instance."
        )


def _config_values(config: Any) -> Any:
    if config is None:
        return {}
    return config.to_diff_dict() if hasattr(config, "to_diff_dict") else config.to_dict()


def _relevant(values: dict[str, Any], irrelevant: re.Pattern[str]) -> str:
    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): kept(v) for k, v in value.items() if not irrelevant.fullmatch(str(k))}
        return sorted(map(str, value)) if isinstance(value, set | frozenset) else value

    return json.dumps(kept(values), sort_keys=True, default=str)


def _dtype_name(model: Any, compute_dtype: torch.dtype | None) -> str:
    """The dtype of most weights; that of the head and of the arithmetic, where they are others."""
    elements: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            elements[parameter.dtype] = elements.get(parameter.dtype, 0) + parameter.numel()
    weights = max(elements, key=elements.__getitem__, default=torch.float32)
    name = _name(weights)
    if compute_dtype not in (None, weights):
        return f"{name} in {_name(compute_dtype)} autocast"
    head = model.get_output_embeddings().weight.dtype
    return name if head == weights or not head.is_floating_point else f"{name} with a head of {_name(head)}"


def _named(things: Any) -> str:
    """The first of some, for messages, and how many more there are."""
    first, *more = things
    return f"{first} and {len(more)} more" if more else str(first)


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _num_threads() -> int:
    """Few: hashing is as fast as memory with some, and every one holds chunks."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _digest_tensors(tensors: dict[str, Tensor], threads: ThreadPoolExecutor) -> str:
    """One hash of names, shapes and values."""
    absent = [name for name, tensor in tensors.items() if tensor.is_meta]
    if absent:
        raise UserError(
            f"the weights of {absent[0]} are not in memory (device_map has put them elsewhere); "
            "load the reference whole, on one device."
        )
    chunks = [
        (name, tuple(tensor.shape), chunk)
        for name, tensor in sorted(tensors.items())
        for chunk in tensor.detach().reshape(-1).split(_CHUNK)
    ]
    digests = threads.map(_digest_values, [chunk for _, _, chunk in chunks])
    return _hash(*(f"{name} {shape} {digest}" for (name, shape, _), digest in zip(chunks, digests, strict=True)))


def _digest_values(values: Tensor) -> str:
    """Of a flat tensor. Values that bfloat16 holds exactly are hashed as such, in whichever dtype they are stored."""
    kind = _name(values.dtype)
    if values.dtype == torch.float16:
        values = values.float()  # exact
    # From here on NumPy: PyTorch would start threads of its own in each of ours.
    data = values.cpu().contiguous().view(torch.uint8).numpy() if values.numel() else np.empty(0, np.uint8)
    if values.dtype == torch.float32:
        bits, kind = data.view(np.uint32), "float32"
        if not (bits[:_GLANCE] & 0xFFFF).any() and not (bits & 0xFFFF).any():
            data, kind = (bits >> 16).astype(np.uint16), "bfloat16"
    return f"{kind} {hashlib.sha256(data.data).hexdigest()}"  # processors have instructions for it


def _hash(*lines: str) -> str:
    return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()
