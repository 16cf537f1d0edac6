"""transformers causal language models as fastdpo runs them: a packed backbone pass, and the head as plain tensors."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from fastdpo.attention import packed_forward
from fastdpo.functional import linear_loss, linear_token_logps
from fastdpo.groups import length_desensitized
from fastdpo.ops import sum_by_id
from fastdpo.packing import PreferenceBatch
from fastdpo.types import LossOutput, UserError


@dataclass(frozen=True)
class LMHead:
    """logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)"""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def kwargs(self) -> dict[str, Any]:
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}


def unwrapped(model: Any) -> Any:
    """The model inside distributed wrappers, adapters and all."""
    while hasattr(model, "module") and isinstance(model.module, torch.nn.Module):
        model = model.module
    return model


def check_architecture(config: Any, name: str, class_name: str | None = None) -> None:
    """That a language model, known by its config (and class), reads a row once, from left to right.

    Raises:
        UserError: it is an encoder-decoder, or an encoder.
    """
    from transformers.models.auto import modeling_auto as known

    check_no_encoder_decoder(config, name)
    kind = getattr(config, "model_type", None)
    masked = known.MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind)
    if masked is None:
        return
    causal = known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    encoder = causal is None if class_name is None else class_name == masked != causal
    if encoder or getattr(config, "is_decoder", None) is False:
        raise UserError(
            f"{name} is an encoder ({kind}): each token sees what follows it, so it gives no log-probs of a "
            f"completion; {_DECODER_ONLY}."
        )


def check_no_encoder_decoder(config: Any, name: str) -> None:
    """
    Raises:
        UserError: the model of this config, or its text part, is one.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if any(getattr(each, "is_encoder_decoder", False) for each in (config, text)):
        raise UserError(
            f"{name} is an encoder-decoder ({getattr(config, 'model_type', 'unknown')}), which reads prompt and "
            f"completion apart, and batches hold both in one row; {_DECODER_ONLY}."
        )


_DECODER_ONLY = "take a decoder-only model, as Llama, Qwen or GPT-2 (AutoModelForCausalLM)"


def causal_lm(model: Any) -> Any:
    """The transformers model inside adapters and distributed wrappers.

    Raises:
        ValueError: it is no transformers model with a language-model head, or no decoder.
    """
    inner = unwrapped(model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if hasattr(inner, "config") and not torch.compiler.is_compiling():
        check_architecture(inner.config, type(inner).__name__, type(inner).__name__)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None or getattr(head, "weight", None) is None:
        raise UserError(f"{type(inner).__name__} has no language-model head; load the model with AutoModelForCausalLM.")
    return inner


def vocabulary_size(model: Any) -> int:
    """How many tokens a transformers model has embeddings for, and, of a language model, logits."""
    parts = [model.get_input_embeddings(), getattr(model, "get_output_embeddings", lambda: None)()]
    return min(_rows(part) for part in parts if part is not None)


def _rows(embeddings: Any) -> int:
    for wrapped in ("base_layer", "original_module", "token_adapter"):  # an adapter's sizes may be others
        if isinstance(getattr(embeddings, wrapped, None), torch.nn.Module):
            return _rows(getattr(embeddings, wrapped))
    for name in ("num_embeddings", "out_features"):  # of quantized weights the shape does not say it
        if isinstance(rows := getattr(embeddings, name, None), int):
            return rows
    return int(embeddings.weight.shape[0])


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode within it, and each module in the mode it had afterwards.

    But for quantized layers, which in evaluation mode run otherwise than in training: on a CPU, bitsandbytes' 4-bit
    layers repack their weights for good, into a layout without a gradient, and its 8-bit layers round activations.
    They have no dropout of their own.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for module in _quantized_layers(model):
        _unpack(module)
        module.training = True
    try:
        yield
    finally:
        model.train(modes[0][1])  # whatever of its own a model does then
        for module, training in modes:
            module.training = training


@contextmanager
def weights_as_trained(model: Any) -> Iterator[None]:
    """Within it, no pass in evaluation mode repacks quantized weights, even in a callback of somebody else's."""
    before = []
    for module in _quantized_layers(model):
        _unpack(module)
        if getattr(module, _MAY_REPACK, False):
            before.append(module)
            setattr(module, _MAY_REPACK, False)
    try:
        yield
    finally:
        for module in before:
            setattr(module, _MAY_REPACK, True)


_MAY_REPACK = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit


def _quantized_layers(model: Any) -> list[Any]:
    layers = getattr(sys.modules.get("bitsandbytes"), "nn", None)
    if layers is None:
        return []
    return [module for module in model.modules() if isinstance(module, layers.Linear4bit | layers.Linear8bitLt)]


def restore_weights(model: Any) -> None:
    """Takes back what a pass in evaluation mode has done to weights: repacked 4-bit weights, whose scales it rounded,
    and RWKV's, which it divides by powers of two."""
    for module in _quantized_layers(model):
        _unpack(module)
    for module in model.modules():
        if getattr(module, "layers_are_rescaled", False):
            training, module.training = module.training, True
            with torch.no_grad():
                module._rescale_layers()
            module.training = training


def _unpack(module: Any) -> None:
    if not getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
        return
    module.state_dict()  # bitsandbytes unpacks before it saves
    state = module.weight.quant_state
    if state.absmax.dim() == 2:  # but leaves scales that are not quantized themselves as they were packed
        state.absmax = state.absmax.T.reshape(-1).float()


def lm_head(model: Any) -> LMHead:
    """The head of a causal LM (as `causal_lm` returns it), with the final scale and softcap of its config."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None):  # Granite divides by it, HyperCLOVA X multiplies
        scale = float(config.logits_scaling) ** (1 if config.model_type == "hyperclovax" else -1)
    if getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        scale = float(config.lm_head_multiplier)
    softcaps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, RecurrentGemma, xLSTM
    softcap = next(filter(None, (getattr(config, name, None) for name in softcaps)), None)
    return LMHead(head.weight, getattr(head, "bias", None), softcap, scale)


def target_hidden_states(model: Any, batch: PreferenceBatch, *, attention_backend: str = "auto") -> Tensor:
    """(N, D): the hidden states that predict the batch's targets. `model` as `causal_lm` returns it."""
    return run_backbone(model, batch, attention_backend)[0][batch.target_rows]


def run_backbone(model: Any, batch: PreferenceBatch, attention_backend: str, **options: Any) -> tuple[Tensor, Any]:
    """The hidden states of all tokens, (T, D) packed and (S * T, D) padded, and all that the backbone returned."""
    backbone = model.base_model
    if backbone is model:  # Llama 4's text model names its backbone otherwise than it says
        backbone = getattr(model, "model", model)
    if backbone is model:
        raise ValueError(f"{type(model).__name__} does not tell its backbone apart from its head (base_model_prefix).")
    if not torch.compiler.is_compiling():
        _check_lengths(model, batch)
    inputs = options | {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.packing == "padded":
        output = backbone(**inputs, attention_mask=batch.attention_mask)
    else:
        if batch.get("attention_mask") is not None:
            raise ValueError("a packed batch takes no attention_mask: its layout says what each token sees.")
        # The mask without padding keeps transformers from guessing at sequences by the positions, and from waiting for
        # the device to do so.
        mask = torch.ones_like(batch.input_ids, dtype=torch.bool)
        packed = {"packed_layout": batch.layout, "attention_backend": attention_backend}
        # A tensor's attribute too, for decoder layers that hand their attention nothing but the positions.
        batch.position_ids.packed = packed
        with packed_forward(model):
            output = backbone(**inputs, attention_mask=mask, **packed)
    hidden = output[0]
    return hidden.reshape(-1, hidden.shape[-1]), output


@dataclass(frozen=True)
class PositionLimit:
    """No sequence may be longer than `tokens`; `why` completes "the model has ..."."""

    tokens: int
    why: str


def position_limit(model: Any) -> PositionLimit | None:
    """How long a sequence may be for a causal LM (as `causal_lm` returns it) to give it what it has alone."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    limits = [] if positions is None else [PositionLimit(int(positions), f"{positions} positions")]
    rotary = getattr(config, "rope_parameters", None) or {}
    for each in [rotary, *(value for value in rotary.values() if isinstance(value, dict))]:  # one, or one a layer type
        kind = each.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        trained = each.get("original_max_position_embeddings") if kind == "longrope" else positions
        trained = trained or getattr(config, "original_max_position_embeddings", None)
        if trained is not None:
            why = f"rotary positions ({kind}) that beyond {trained} tokens change for all sequences of a batch"
            limits.append(PositionLimit(int(trained), why))
    return min(limits, key=lambda limit: limit.tokens, default=None)


def _check_lengths(model: Any, batch: PreferenceBatch) -> None:
    longest = batch.input_ids.shape[1] if batch.packing == "padded" else batch.layout.max_seqlen_k
    limit = position_limit(model)
    if limit is not None and longest > limit.tokens:
        raise UserError(
            f"the batch holds a sequence of {longest} tokens, and {type(model).__name__} has {limit.why}; "
            f"cut sequences to max_length={limit.tokens}."
        )


def target_logps(
    model: Any, batch: PreferenceBatch, *, attention_backend: str = "auto", memory_budget: int | None = None
) -> Tensor:
    """(N,): the log-prob of each of the batch's targets. `model` as `causal_lm` returns it."""
    hidden = target_hidden_states(model, batch, attention_backend=attention_backend)
    head = lm_head(model)
    return linear_token_logps(hidden, head.weight, batch.target_ids, memory_budget=memory_budget, **head.kwargs())


def forward_logps(
    model: Any, batch: PreferenceBatch, *, attention_backend: str, ld_alpha: float | None = None,
    memory_budget: int | None = None,
) -> Tensor:  # fmt: skip
    """`fastdpo.sequence_logps`, through the model's own forward where something is wrapped around it; unverified."""
    inner = causal_lm(model)
    options: dict[str, Any] = {
        "attention_backend": attention_backend, "ld_alpha": ld_alpha, "memory_budget": memory_budget
    }  # fmt: skip
    if has_wrapper(model):
        with extended_forward(inner):
            return through_forward(model, batch, pass_options=options)
    return _sequence_logps(inner, batch, **options)


def _sequence_logps(
    inner: Any, batch: PreferenceBatch, *, attention_backend: str, ld_alpha: float | None,
    memory_budget: int | None = None,
) -> Tensor:  # fmt: skip
    logps = target_logps(inner, batch, attention_backend=attention_backend, memory_budget=memory_budget)
    if ld_alpha is not None:
        return length_desensitized(logps, batch.sequence_ids, batch.num_sequences, ld_alpha)
    return sum_by_id(logps, batch.sequence_ids, batch.num_sequences).to(logps.dtype)


def forward_loss(model: Any, batch: PreferenceBatch, ref_logps: Tensor | None, **options: Any) -> LossOutput:
    """`fastdpo.batch_loss`, in the same way."""
    inner = causal_lm(model)
    if has_wrapper(model):
        with extended_forward(inner):
            return LossOutput.from_dict(through_forward(model, batch, ref_logps, loss_options=options))
    return _batch_loss(inner, batch, ref_logps, **options)


def _batch_loss(
    inner: Any,
    batch: PreferenceBatch,
    ref_logps: Tensor | None,
    *,
    attention_backend: str,
    router_aux_loss_coef: float,
    **options: Any,
) -> LossOutput:
    router = {"output_router_logits": True} if router_aux_loss_coef else {}
    hidden, backbone_output = run_backbone(inner, batch, attention_backend, **router)
    head = lm_head(inner)
    given = {name: batch[name] for name in _LOSS_INPUTS if name in batch}
    if isinstance(ref_logps, Tensor) and len(ref_logps) != batch.num_sequences:
        raise ValueError(
            f"ref_logps has shape {tuple(ref_logps.shape)}; this batch of {batch.data} has {batch.num_sequences} "
            "sequences."
        )
    output = linear_loss(
        hidden[batch.target_rows],
        head.weight,
        batch.target_ids,
        batch.get("ref_logps") if ref_logps is None else ref_logps,
        sequence_ids=batch.sequence_ids,
        tokens_per_pair=batch.tokens_per_pair,
        **head.kwargs(),
        **(given | options),
    )
    if not router_aux_loss_coef:
        return output
    aux_loss = _load_balancing_loss(inner, backbone_output.router_logits, batch)
    weight = batch.total_weight if options.get("reduction") == "sum" else 1  # as much a pair, however it is reduced
    return replace(output, loss=output.loss + router_aux_loss_coef * weight * aux_loss, aux_loss=aux_loss.detach())


_LOSS_INPUTS = (
    "num_sequences",
    "pair_weights",
    "list_sizes",
    "desirable",
    "mean_chosen_length",
)  # of a batch, where it has them


def has_wrapper(model: Any) -> bool:
    """Whether a pass must go through the model's own forward: data-parallel wrappers and sharded models act there."""
    if isinstance(model, FSDPModule) or isinstance(getattr(model, "module", None), torch.nn.Module):
        return True
    return hasattr(model, "get_base_model") and has_wrapper(model.get_base_model())


class _AsItIs:
    """A batch and its references, past wrappers that make other dicts of dicts and cast the tensors they find."""

    def __init__(self, batch: PreferenceBatch, ref_logps: Tensor | None) -> None:
        self.batch, self.ref_logps = batch, ref_logps


def through_forward(model: Any, batch: PreferenceBatch, ref_logps: Tensor | None = None, **options: Any) -> Any:
    """What a model whose forward is extended makes of a batch, through all that is wrapped around it."""
    return model(preference_batch=_AsItIs(batch, ref_logps), **options)


def _run_batch(inner: Any, batch: PreferenceBatch, *, ref_logps: Any, loss_options: Any, pass_options: Any) -> Any:
    if loss_options is not None:
        return _batch_loss(inner, batch, ref_logps, **loss_options).to_dict()
    return _sequence_logps(inner, batch, **pass_options)


def extend_forward(inner: Any, run: Callable[..., Any] = _run_batch) -> None:
    """Lets a causal LM take a batch: `through_forward(model, batch, ref_logps, loss_options=...)` is
    `forward_loss(...).to_dict()`, and with `pass_options=` in their place `forward_logps`. Other calls are as before.

    On the instance, not the class: the pass then runs inside whatever wraps this model's forward. As a bound method
    that holds nothing else, so that a copy of the model is bound to the copy. `run` is what such a call does, for
    models with another head.
    """
    before = inner.__dict__.get("forward")
    if _is_extended(before):
        return
    original = type(inner).forward

    @functools.wraps(original)
    def forward(
        self: Any,
        *args: Any,
        preference_batch: _AsItIs | None = None,
        loss_options: Any = None,
        pass_options: Any = None,
        **kwargs: Any,
    ) -> Any:
        if preference_batch is not None:
            given = preference_batch
            own = {"ref_logps": given.ref_logps, "loss_options": loss_options, "pass_options": pass_options}
            return run(self, given.batch, **own)
        # Somebody else's override (offloading hooks, say) goes on working.
        return original(self, *args, **kwargs) if before is None else before(*args, **kwargs)

    forward.takes_preference_batch = True  # type: ignore[attr-defined]
    forward.before = before  # type: ignore[attr-defined]
    inner.forward = types.MethodType(forward, inner)


def restore_forward(inner: Any) -> None:
    """Takes back what `extend_forward` has done, where nothing else was put around it since."""
    forward = inner.__dict__.get("forward")
    if not _is_extended(forward):
        return
    if forward.before is None:
        del inner.forward
    else:
        inner.forward = forward.before


@contextmanager
def extended_forward(inner: Any, run: Callable[..., Any] = _run_batch) -> Iterator[None]:
    """`extend_forward` within it; a model that is extended already stays so."""
    was_extended = _is_extended(inner.__dict__.get("forward"))
    extend_forward(inner, run)
    try:
        yield
    finally:
        if not was_extended:
            restore_forward(inner)


def _is_extended(forward: Any) -> bool:
    return getattr(forward, "__func__", None) is not None and hasattr(forward, "takes_preference_batch")


def is_mixture_of_experts(model: Any) -> bool:
    """Whether a causal LM (as `causal_lm` returns it) has a load-balancing loss over its routers."""
    return (
        hasattr(model.config.get_text_config(), "output_router_logits") and _balancing_loss_function(model) is not None
    )


def _balancing_loss_function(model: Any) -> Any:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)


def routed_experts(model: Any) -> tuple[int, int] | None:
    """(experts of a layer, how many of them a token takes), where the config of a causal LM says so."""
    config = model.config.get_text_config()

    def known(*names: str) -> int | None:
        return next((value for name in names if (value := getattr(config, name, None)) is not None), None)

    experts = known("num_local_experts", "num_experts", "n_routed_experts")
    taken = known("num_experts_per_tok", "experts_per_token", "moe_topk", "top_k")
    return (experts, taken) if experts and taken else None


def _load_balancing_loss(model: Any, router_logits: Any, batch: PreferenceBatch) -> Tensor:
    """The model's own load-balancing loss over the tokens of the batch."""
    experts = routed_experts(model)
    if experts is None:
        raise UserError(
            f"the config of {type(model).__name__} does not say how many experts it has; set router_aux_loss_coef=0."
        )
    return _balancing_loss_function(model)(router_logits, *experts, batch.get("attention_mask"))
