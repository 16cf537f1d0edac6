"""Log-probs and losses of a model's completions. A model is verified in the way it runs before its first number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.losses import get_loss
from fastdpo.models import causal_lm, forward_logps, forward_loss, target_logps
from fastdpo.packing import PreferenceBatch, pack, pad
from fastdpo.types import LossOutput
from fastdpo.verify import ensure_verified

Sequences = Sequence[tuple[Any, Any]]  # of (prompt ids, completion ids), lists or arrays


def sequence_logps(
    model: Any,
    batch: PreferenceBatch,
    *,
    attention_backend: str = "auto",
    ld_alpha: float | None = None,
    memory_budget: int | None = None,
) -> Tensor:
    """Sum of the completion's log-probs for each sequence of a batch from PreferenceCollator.

    Args:
        model: a transformers causal language model, plain, with PEFT adapters, or in a data-parallel wrapper.
        batch: on the model's device (`batch.to(device)`).
        ld_alpha: of pairs: what tokens beyond the length of the pair's shorter answer weigh, as in the loss.
        memory_budget: bytes that logits may take, as in `linear_token_logps`.

    Returns:
        (S,) float32, in the order of the batch's sequences (of pairs (2B,), chosen first), differentiable in the
        model's parameters; under the reference, what `batch_loss` takes as `ref_logps`.

    Raises:
        ValueError: the model cannot run in the way the batch is packed; found on the first pass, by comparing a few
            random tokens with the model's own logits.
    """
    if ld_alpha is not None and batch.data != "pairs":
        raise ValueError(f"ld_alpha={ld_alpha} compares the two answers of a pair, and the batch holds {batch.data}.")
    ensure_verified(model, batch.packing, attention_backend)
    return forward_logps(
        model, batch, attention_backend=attention_backend, ld_alpha=ld_alpha, memory_budget=memory_budget
    )


def batch_loss(
    model: Any,
    batch: PreferenceBatch,
    ref_logps: Tensor | None = None,
    *,
    attention_backend: str = "auto",
    router_aux_loss_coef: float = 0.0,
    **options: Any,
) -> LossOutput:
    """The preference loss of a batch from PreferenceCollator: backbone once, completion tokens through `linear_loss`.

    Args:
        model: a transformers causal language model, plain, with PEFT adapters, or in a data-parallel wrapper.
        batch: on the model's device (`batch.to(device)`).
        ref_logps: (S,), one sum a sequence (of pairs chosen first); default: those that the batch carries.
        router_aux_loss_coef: of a mixture of experts: `loss` then holds that many times its load-balancing loss, and
            `aux_loss` the balancing loss itself, in which every token that the backbone ran counts once, padding never.
        options: of `linear_loss`: beta, loss_type, label_smoothing, reduction, memory_budget, ... Weights, list sizes
            and labels come from the batch.

    Raises:
        ValueError: as `sequence_logps`, or as `linear_loss`.
    """
    loss_type = options.get("loss_type", "sigmoid")
    wanted = get_loss(loss_type if isinstance(loss_type, str) or not loss_type else loss_type[0]).data
    if wanted != batch.data:
        raise ValueError(
            f"the batch holds {batch.data}, and loss_type {loss_type} is a loss of {wanted}; take a loss of "
            f"{batch.data} (fastdpo.list_losses() has them)."
        )
    ensure_verified(model, batch.packing, attention_backend)
    return forward_loss(
        model, batch, ref_logps,
        attention_backend=attention_backend, router_aux_loss_coef=router_aux_loss_coef, **options,
    )  # fmt: skip


def completion_logps(
    model: Any, sequences: Sequences, *, packing: str = "prefix", attention_backend: str = "auto"
) -> list[Tensor]:
    """Per-token log-probs of the completion of every (prompt, completion), one CPU tensor each; forward only.

    Raises:
        ValueError: as `sequence_logps`.
    """
    ensure_verified(model, packing, attention_backend)
    scoring = scoring_batch(sequences, packing)
    batch = scoring.batch.to(scoring_device(model))
    return list(score(model, batch, attention_backend=attention_backend).cpu().split(scoring.counts))


# The same in steps, for those who pack one batch while another runs.


def scoring_device(model: Any) -> torch.device:
    """Where a batch must be for `score`."""
    device: torch.device = causal_lm(model).get_output_embeddings().weight.device
    return device


def score(model: Any, batch: PreferenceBatch, *, attention_backend: str = "auto") -> Tensor:
    """Log-probs of all targets of a `scoring_batch`, in a row, on the model's device. Verifies nothing."""
    with torch.no_grad():
        return target_logps(causal_lm(model), batch, attention_backend=attention_backend)


@dataclass(frozen=True)
class ScoringBatch:
    """What `score` needs of a batch, and how many targets each completion has."""

    batch: PreferenceBatch
    counts: tuple[int, ...]


def scoring_batch(sequences: Sequences, packing: str) -> ScoringBatch:
    if packing == "padded":
        padded = pad(sequences)
        rows = torch.cat(padded.target_rows)
        batch = PreferenceBatch(
            packing=packing,
            input_ids=padded.input_ids,
            position_ids=padded.position_ids,
            attention_mask=padded.attention_mask,
            target_rows=rows,
            target_ids=padded.targets(rows),
        )
        return ScoringBatch(batch, tuple(len(rows) for rows in padded.target_rows))
    packed = pack(sequences, share=packing == "prefix")
    batch = PreferenceBatch(
        packing=packing,
        input_ids=packed.input_ids,
        position_ids=packed.position_ids,
        layout=packed.layout,
        target_rows=packed.target_rows,
        target_ids=packed.target_ids,
    )
    return ScoringBatch(batch, packed.target_counts)
