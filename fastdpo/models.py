"""transformers causal language models as fastdpo runs them: a packed backbone pass, and the head as plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.attention import count_packed_layers, packed_forward
from fastdpo.functional import linear_loss, linear_token_logps
from fastdpo.packing import Group, PreferenceBatch, PreferenceCollator, pack, pad
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


def causal_lm(model: Any) -> Any:
    """The transformers model inside adapters and distributed wrappers.

    Raises:
        ValueError: it is no transformers model with a language-model head.
    """
    inner = model
    while hasattr(inner, "module") and isinstance(inner.module, torch.nn.Module):
        inner = inner.module
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if head is None or getattr(head, "weight", None) is None:
        raise UserError(f"{type(inner).__name__} has no language-model head; load the model with AutoModelForCausalLM.")
    return inner


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode within it, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def lm_head(model: Any) -> LMHead:
    """The head of a causal LM (as `causal_lm` returns it), with the final scale and softcap of its config."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logit_scale", None):  # Cohere
        scale = float(config.logit_scale)
    if getattr(config, "logits_scaling", None):  # Granite
        scale = 1.0 / float(config.logits_scaling)
    if getattr(config, "lm_head_multiplier", None):  # Falcon-H1
        scale = float(config.lm_head_multiplier)
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return LMHead(head.weight, getattr(head, "bias", None), softcap, scale)


def target_hidden_states(model: Any, batch: PreferenceBatch, *, attention_backend: str = "auto") -> Tensor:
    """(N, D): the hidden states that predict the batch's targets. `model` as `causal_lm` returns it."""
    backbone = model.base_model
    if backbone is model:
        raise ValueError(f"{type(model).__name__} does not tell its backbone apart from its head (base_model_prefix).")
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    if batch.packing == "padded":
        hidden = backbone(**inputs, attention_mask=batch.attention_mask)[0]
    else:
        with packed_forward(model):
            hidden = backbone(**inputs, packed_layout=batch.layout, attention_backend=attention_backend)[0]
    return hidden.reshape(-1, hidden.shape[-1])[batch.target_rows]


def completion_logps(
    model: Any, groups: Sequence[Group], *, packing: str = "prefix", attention_backend: str = "auto"
) -> list[Tensor]:
    """Per-token log-probs of every completion, one CPU tensor each, group by group; forward only."""
    inner = causal_lm(model)
    batch, sizes = _scoring_batch(groups, packing)
    with torch.no_grad():
        batch = batch.to(inner.get_output_embeddings().weight.device)
        hidden = target_hidden_states(inner, batch, attention_backend=attention_backend)
        head = lm_head(inner)
        logps = linear_token_logps(hidden, head.weight, batch.target_ids, **head.kwargs())
    return list(logps.cpu().split(sizes))


def _scoring_batch(groups: Sequence[Group], packing: str) -> tuple[PreferenceBatch, list[int]]:
    """What `target_hidden_states` needs of a batch, and how many targets each completion has."""
    if packing == "padded":
        padded = pad([(group.prompt, completion) for group in groups for completion in group.completions])
        rows = torch.cat(padded.target_rows)
        batch = PreferenceBatch(
            packing=packing,
            input_ids=padded.input_ids,
            position_ids=padded.position_ids,
            attention_mask=padded.attention_mask,
            target_rows=rows,
            target_ids=padded.targets(rows),
        )
        return batch, [len(rows) for rows in padded.target_rows]
    packed = pack(groups, share=packing == "prefix")
    batch = PreferenceBatch(
        packing=packing,
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        layout=packed.layout,
        target_rows=packed.target_rows,
        target_ids=packed.target_ids,
    )
    count = sum(len(group.completions) for group in groups)
    return batch, torch.bincount(packed.completion_ids, minlength=count).tolist()


def sequence_logps(model: Any, batch: PreferenceBatch, *, attention_backend: str = "auto") -> Tensor:
    """Sum of the completion's log-probs for each sequence of a batch from PreferenceCollator.

    Args:
        model: a transformers causal language model, plain or with PEFT adapters.
        batch: on the model's device (`batch.to(device)`).

    Returns:
        (2B,) float32, chosen first, differentiable in the model's parameters.
    """
    inner = causal_lm(model)
    hidden = target_hidden_states(inner, batch, attention_backend=attention_backend)
    head = lm_head(inner)
    logps = linear_token_logps(hidden, head.weight, batch.target_ids, **head.kwargs())
    return logps.new_zeros(2 * batch.num_pairs).index_add(0, batch.sequence_ids, logps)


def batch_loss(
    model: Any,
    batch: PreferenceBatch,
    ref_logps: Tensor | None = None,
    *,
    attention_backend: str = "auto",
    **options: Any,
) -> LossOutput:
    """The preference loss of a batch from PreferenceCollator: backbone once, completion tokens through `linear_loss`.

    Args:
        model: a transformers causal language model, plain or with PEFT adapters.
        batch: on the model's device (`batch.to(device)`).
        ref_logps: (2B,), chosen first; default: those that the batch carries.
        options: of `linear_loss`: beta, loss_type, label_smoothing, reduction, memory_budget, ...
    """
    inner = causal_lm(model)
    hidden = target_hidden_states(inner, batch, attention_backend=attention_backend)
    head = lm_head(inner)
    return linear_loss(
        hidden,
        head.weight,
        batch.target_ids,
        batch.get("ref_logps") if ref_logps is None else ref_logps,
        sequence_ids=batch.sequence_ids,
        tokens_per_pair=batch.tokens_per_pair,
        **head.kwargs(),
        **options,
    )


# How far a packed log-prob may lie from the model's own, in nats a token, by the dtype of the arithmetic.
_VERIFY_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 3e-1}


def verify_packing(model: Any, packing: str, *, attention_backend: str = "auto") -> None:
    """Compares two small random pairs, run as `packing` says, with the model's own logits, sequence by sequence.

    Raises:
        UserError: the model does not run this way, or its log-probs differ: packed attention, positions, or the head's
            scale and softcap are not what this architecture does.
    """
    inner = causal_lm(model)
    device = inner.get_output_embeddings().weight.device
    generator = torch.Generator().manual_seed(0)
    vocabulary = inner.get_output_embeddings().weight.shape[0]

    def draw(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    rows = [
        {"prompt_ids": draw(p), "chosen_ids": draw(c), "rejected_ids": draw(r)} for p, c, r in ((7, 5, 3), (4, 2, 6))
    ]
    sequences = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    starts = [len(row["prompt_ids"]) for row in rows] * 2
    attention = inner.config._attn_implementation
    try:
        with evaluating(model), torch.no_grad():
            theirs = []
            for ids, start in zip(sequences, starts, strict=True):
                tokens = torch.tensor([ids], device=device)
                logits = inner(input_ids=tokens, use_cache=False).logits[0, start - 1 : -1]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                theirs.append(logits.log_softmax(-1).gather(1, tokens[0, start:, None]).sum().cpu())
            batch = PreferenceCollator(packing=packing)(rows).to(device)
            try:
                with count_packed_layers() as layers:
                    ours = sequence_logps(model, batch, attention_backend=attention_backend).cpu()
            except (TypeError, ValueError) as error:
                raise UserError(f"packing={packing!r} does not run on {type(inner).__name__}: {error}") from error
        wanted = 0 if packing == "padded" else inner.config.get_text_config().num_hidden_layers
        if len(layers) < wanted:
            raise UserError(
                f"packing={packing!r} cannot serve {type(inner).__name__}: only {len(layers)} of its {wanted} layers "
                "run attention through transformers' attention interface; the others (recurrent, linear or "
                "hand-written attention) would mix the packed sequences. Use packing='padded', or packing='auto'."
            )
        _check_equal(ours, torch.stack(theirs), sequences, starts, inner, packing)
    except ValueError:
        if inner.config._attn_implementation != attention:
            inner.set_attn_implementation(attention)
        raise


def _check_equal(
    ours: Tensor, theirs: Tensor, sequences: list[list[int]], starts: list[int], inner: Any, packing: str
) -> None:
    kind = inner.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else inner.dtype
    lengths = torch.tensor([len(ids) - start for ids, start in zip(sequences, starts, strict=True)])
    error = ((ours - theirs).abs() / lengths).max().item()
    if not error <= _VERIFY_TOLERANCE.get(dtype, 1e-4):
        raise UserError(
            f"packing={packing!r} does not give the log-probs of {type(inner).__name__}: off by {error:.2g} nats a "
            "token on a small test batch. Use packing='padded', or packing='auto' to have it chosen."
        )
