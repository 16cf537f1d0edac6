"""What of a model neither its saved tensors nor its config tell: compared with a model made anew from the config."""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastdpo.adapters import adapter_wrappers, place
from fastdpo.models import evaluating, unwrapped
from fastdpo.types import UserError

# Attributes of modules without a bearing on log-probs.
_IRRELEVANT = re.compile(
    r"_.*|training|gradient_checkpointing|.*dropout.*|.*pdrop|layerdrop|name_or_path|.*pad(ding)?_(idx|token_id)|"
    r"(bos|eos)_token_id|max_seq_len_cached|is_(loaded_in_.*|quantized|parallelizable)|model_parallel|hf_.*|"
    r"vocab_size|num_labels|loss_type|output_(attentions|hidden_states|router_logits)|use_cache|dtype"
)
_PLAIN = (bool, int, float, str, tuple, type(None))
# Whose hooks and replaced forwards move data, cast or capture, and leave alone what is computed.
_KNOWN = {
    "torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "fastdpo", "liger_kernel", "kernels",
}  # fmt: skip


class Unsaved:
    """buffers     by name, tensors that no checkpoint holds and that are not what the config gives
    attributes  lines about modules that are not what the config makes of them
    """

    def __init__(self, inner: Any, saved: set[str]) -> None:
        self.buffers: dict[str, Tensor] = {}
        self.attributes: list[str] = []
        made = _made_anew(inner)
        others = None if made is None else dict(made.named_modules())
        wrappers = dict(adapter_wrappers(inner))
        for name, module in inner.named_modules():
            plain, wrapper, _ = place(name, wrappers)
            if wrapper is not None or name in wrappers:
                continue
            other = None if others is None else others.get(plain)
            for leaf, tensor in _unsaved_tensors(module, other):
                if f"{name}.{leaf}".lstrip(".") not in saved and not _as_given(tensor, other, leaf):
                    self.buffers[f"{plain}.{leaf}".lstrip(".")] = tensor
            if other is not None:
                self.attributes += _changed(plain, module, other)


def _made_anew(inner: Any) -> Any:
    """A model of this config without weights, in the dtype that this one was loaded in; None where none can be made."""
    config, embeddings = copy.deepcopy(inner.config), inner.get_input_embeddings()
    if getattr(embeddings, "weight", None) is not None:  # the config may have got another token to pad with since
        config.get_text_config().pad_token_id = getattr(embeddings, "padding_idx", None)
    before, verbosity = torch.get_default_dtype(), transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        torch.set_default_dtype(inner.dtype)
        with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
            return type(inner)(config)
    except Exception:  # whatever a model of unknown code raises: its tensors are then hashed one and all
        return None
    finally:
        torch.set_default_dtype(before)
        transformers.logging.set_verbosity(verbosity)


def _unsaved_tensors(module: Any, other: Any) -> Iterator[tuple[str, Tensor]]:
    """Buffers, and tensors that are plain attributes from the beginning (others are made by a pass)."""
    for leaf, tensor in module._buffers.items():
        if tensor is not None and not _recomputed(module, leaf):
            yield leaf, tensor
    for leaf, value in vars(module).items():
        if isinstance(value, Tensor) and isinstance(vars(other).get(leaf) if other is not None else None, Tensor):
            yield leaf, value


def _recomputed(module: Any, leaf: str) -> bool:
    """Rotary frequencies that each pass sets from the others, or that none reads."""
    if not leaf.endswith("inv_freq"):
        return False
    kind = getattr(module, "rope_type", None)
    original = leaf.endswith("original_inv_freq")
    if isinstance(kind, dict):
        kind = kind.get(leaf.removesuffix("inv_freq").removesuffix("original_").rstrip("_"))
    return original != (kind in ("dynamic", "longrope"))


def _as_given(tensor: Tensor, other: Any, leaf: str) -> bool:
    """Whether a tensor is what the config gives, up to what devices make of the last digit of a float32."""
    given = None if other is None else getattr(other, leaf, None)
    if not isinstance(given, Tensor) or given.is_meta or given.shape != tensor.shape or tensor.is_meta:
        return False
    own, given = tensor.detach().cpu(), given.detach().cpu()
    if own.is_complex() and given.is_complex():
        own, given = torch.view_as_real(own), torch.view_as_real(given)
    if not own.is_floating_point():
        return torch.equal(own, given.to(own.dtype))
    return torch.allclose(own.double(), given.double(), rtol=1e-6, atol=0.0, equal_nan=True)


def _changed(name: str, module: Any, other: Any) -> list[str]:
    if isinstance(module, torch.nn.Dropout):
        return []
    lines = []
    kinds = [type(module), type(other)]
    known = any(kind.__module__.split(".")[0] in ("bitsandbytes", "liger_kernel") for kind in kinds)
    if kinds[0] is not kinds[1] and not known and not isinstance(module, FSDPModule):
        lines.append(f"{name} is {kinds[0].__qualname__}")
    given = vars(other)
    for key, value in vars(module).items():
        compared = key in given and isinstance(value, _PLAIN) and isinstance(given[key], _PLAIN)
        if compared and value != given[key] and not _IRRELEVANT.fullmatch(key):
            lines.append(f"{f'{name}.{key}'.lstrip('.')}={value}")
    return lines


def quantization(inner: Any, compute_dtype: torch.dtype) -> list[str]:
    """How bitsandbytes' layers compute, where that is not as the config and the rest of the model have it."""
    layers = getattr(sys.modules.get("bitsandbytes"), "nn", None)
    if layers is None:
        return []
    given = getattr(inner.config, "quantization_config", None) or {}
    asked: dict[str, Any] = given if isinstance(given, dict) else given.to_dict()
    lines = set()
    for module in inner.modules():
        if isinstance(module, layers.Linear4bit):
            dtype = module.compute_dtype
            if dtype not in (None, compute_dtype) and str(dtype).split(".")[-1] != asked.get("bnb_4bit_compute_dtype"):
                lines.add(f"4 bit in {str(dtype).split('.')[-1]}")
        elif isinstance(module, layers.Linear8bitLt):
            if module.state.threshold != asked.get("llm_int8_threshold"):
                lines.add(f"8 bit with threshold {module.state.threshold:g}")
            if module.state.has_fp16_weights:
                lines.add("8 bit of 16-bit weights")
    return sorted(lines)


def adapter_state(inner: Any) -> str:
    """What adapters in use were set to at run time, against their configs: another scaling, or merged into the base."""
    configs, lines = getattr(inner, "peft_config", {}), []
    for name, wrapper in adapter_wrappers(inner):
        if wrapper.disable_adapters:
            continue
        if getattr(wrapper, "merged", False):
            lines.append(f"{name} merged")
        scaling = getattr(wrapper, "scaling", None)
        if not isinstance(scaling, dict):
            continue
        for number, adapter in enumerate(wrapper.active_adapters):
            if adapter in scaling and not _scaled_as_given(wrapper, adapter, configs.get(adapter)):
                lines.append(f"{name} {number} {scaling[adapter]}")
    return "\n".join(lines)


def _scaled_as_given(wrapper: Any, adapter: str, config: Any) -> bool:
    alphas = getattr(wrapper, "lora_alpha", getattr(wrapper, "alpha", None))
    ranks, value = getattr(wrapper, "r", None), wrapper.scaling[adapter]
    if not isinstance(alphas, dict) or not isinstance(ranks, dict) or not isinstance(value, int | float):
        return False
    if adapter not in alphas or not ranks.get(adapter):
        return False
    rank = math.sqrt(ranks[adapter]) if getattr(config, "use_rslora", False) else ranks[adapter]
    return math.isclose(value, alphas[adapter] / rank, rel_tol=1e-9)


def refuse_hooks(model: Any) -> None:
    """
    Raises:
        UserError: somebody's hook on a module, or a `forward` of their own, changes what the model computes: of two of
            them nothing here tells which is which.
    """
    model = unwrapped(model)
    foreign = list(_foreign(model))
    if not foreign or not _change(model, foreign):
        return
    one = next((each for each in foreign if len(foreign) == 1 or _change(model, [each])), foreign[0])
    raise UserError(
        f"{one.what} changes what the model computes, and neither weights nor config tell how, so its log-probs "
        "cannot be told from those of others in a cache; remove it, or put it into the weights."
    )


def _change(model: Any, foreign: list[_Foreign]) -> bool:
    """Whether the model computes something else without them."""
    try:
        return not torch.equal(_some_logits(model), _without(foreign, lambda: _some_logits(model)))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever that code, or the model without it, raises
        return True


@dataclass
class _Foreign:
    """`held[key]` is code of somebody else's in a model; what it is, in messages."""

    what: str
    held: dict[Any, Any]
    key: Any


def _foreign(model: Any) -> Iterator[_Foreign]:
    for name, module in model.named_modules():
        where = f"on {name or 'the model'}"
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in hooks.items():
                if not _known(hook):
                    yield _Foreign(f"the hook {_name(hook)} {where}", hooks, key)
        forward = vars(module).get("forward")
        if forward is not None and not hasattr(module, "_hf_hook") and not _known(forward):
            yield _Foreign(f"the forward {_name(forward)} that was set {where}", vars(module), "forward")


def _plain_function(function: Any) -> Any:
    function = getattr(function, "func", function)  # of a partial
    return getattr(function, "__func__", function)  # of a method


def _known(function: Any) -> bool:
    function = _plain_function(function)
    # Not __module__, which functools.wraps takes from what is wrapped.
    module = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    return module.split(".")[0] in _KNOWN


def _name(function: Any) -> str:
    function = _plain_function(function)
    return getattr(function, "__qualname__", type(function).__qualname__)


def _without(foreign: list[_Foreign], run: Callable[[], Tensor]) -> Tensor:
    before = [dict(each.held) for each in foreign]
    try:
        for each in foreign:
            del each.held[each.key]
        return run()
    finally:
        for each, values in zip(foreign, before, strict=True):
            if each.key != "forward":
                each.held.clear()  # hooks run in their order
            each.held.update(values)


def _some_logits(model: Any) -> Tensor:
    """Of a few tokens, alike in each call."""
    weight = model.get_input_embeddings().weight
    ids = torch.arange(2, 10, device=weight.device)[None] % weight.shape[0]
    with evaluating(model), torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.clone()
