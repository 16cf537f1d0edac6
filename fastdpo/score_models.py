"""Reward models as fastdpo runs them: sequence classifiers of transformers with one label, chosen and rejected packed.

The hidden states of each sequence's last token go through the model's own score head, within the model's own forward.
Where a model cannot pack, the padded batch goes through that forward as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastdpo import models
from fastdpo.models import check_no_encoder_decoder, has_wrapper, run_backbone, unwrapped
from fastdpo.packing import PreferenceBatch, PreferenceCollator
from fastdpo.sums import preference_loss
from fastdpo.types import UserError, accumulation_dtype
from fastdpo.verify import Compared, Row, ensure_verified


def sequence_classifier(model: Any) -> Any:
    """The transformers model inside adapters and distributed wrappers.

    Raises:
        UserError: it is no sequence classifier with one label.
    """
    inner = unwrapped(model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    name = type(inner).__name__
    if hasattr(inner, "config"):
        check_no_encoder_decoder(inner.config, name)
    remedy = "load it with AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)."
    if hasattr(inner, "get_output_embeddings") and inner.get_output_embeddings() is not None:
        raise UserError(f"{name} is a language model, which gives tokens and no score; {remedy}")
    if getattr(inner, "base_model", inner) is inner:
        raise UserError(f"{name} has no head that gives a score; {remedy}")
    if inner.config.num_labels != 1:
        raise UserError(f"{name} has num_labels={inner.config.num_labels}, and a reward is one score; {remedy}")
    return inner


def sequence_scores(model: Any, batch: PreferenceBatch, *, attention_backend: str = "auto") -> Tensor:
    """model(input_ids, attention_mask).logits of each sequence of a batch from PreferenceCollator(scores=True)

    Args:
        model: a transformers sequence classifier, plain, with PEFT adapters, or in a data-parallel wrapper.
        batch: on the model's device (`batch.to(device)`).

    Returns:
        (2B,) float32 (float64 of such a model), chosen first, differentiable in the model's parameters.

    Raises:
        ValueError: no reward model; a batch that was made for another; a model that cannot run in the way the batch is
            packed, which is found on the first pass by comparing a few random tokens with the model's own scores.
    """
    ensure_verified(model, batch.packing, attention_backend, SCORES)
    return _forward_scores(model, batch, attention_backend)


def extend_forward(inner: Any) -> None:
    """`fastdpo.models.extend_forward` for a reward model: with `loss_options=` a batch becomes the loss
    of its scores (`LossOutput.to_dict`), with `pass_options=` its scores (2B,)."""
    models.extend_forward(inner, _run_batch)


def _forward_scores(model: Any, batch: PreferenceBatch, attention_backend: str) -> Tensor:
    inner = sequence_classifier(model)
    if has_wrapper(model):
        with models.extended_forward(inner, _run_batch):
            return models.through_forward(model, batch, pass_options={"attention_backend": attention_backend})
    return _scores(inner, batch, attention_backend=attention_backend)


def _run_batch(inner: Any, batch: PreferenceBatch, *, ref_logps: Any, loss_options: Any, pass_options: Any) -> Any:
    assert ref_logps is None
    return _scores(inner, batch, **pass_options) if loss_options is None else _loss(inner, batch, **loss_options)


def _loss(inner: Any, batch: PreferenceBatch, *, attention_backend: str, **options: Any) -> dict[str, Any]:
    chosen, rejected = _scores(inner, batch, attention_backend=attention_backend).chunk(2)
    return preference_loss(
        chosen, rejected, margins=batch.get("margins"), pair_weights=batch.get("pair_weights"), **options
    ).to_dict()


def _scores(inner: Any, batch: PreferenceBatch, *, attention_backend: str) -> Tensor:
    pad_token_id = inner.config.get_text_config().pad_token_id
    if batch.get("score_pad_id", -1) != pad_token_id:  # whose last tokens would be others than the model's own
        raise UserError(
            f"the batch is not one for this model's scores; make it with PreferenceCollator(scores=True, "
            f"pad_token_id={pad_token_id}), the model's config.pad_token_id."
        )
    if batch.packing == "padded":
        logits = inner.forward(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    else:
        hidden, _ = run_backbone(inner, batch, attention_backend)
        logits = _through_head(_score_head(inner), hidden[batch.score_rows])
    return logits.squeeze(-1).to(accumulation_dtype(logits.dtype))  # (2B,)


def _score_head(inner: Any) -> Any:
    head = getattr(inner, "score", None)
    if head is None:
        raise UserError(f"{type(inner).__name__} has no module `score`, which packed rows are scored by.")
    return head


def _through_head(head: Any, hidden: Tensor) -> Tensor:
    """In the head's own dtype: bfloat16 autocast would round scores to 8 bits, more than many pairs differ by."""
    weight = getattr(head, "weight", None)
    if weight is None:
        return head(hidden)
    with torch.autocast(hidden.device.type, enabled=False):
        return head(hidden.to(weight.dtype))


# What `fastdpo.verify` compares.


def _packed_scores(model: Any, rows: list[Row], packing: str, attention_backend: str) -> Tensor:
    inner = sequence_classifier(model)
    pad_token_id = inner.config.get_text_config().pad_token_id
    if pad_token_id is None:
        raise UserError(
            f"{type(inner).__name__} scores the last token that is no padding, and its config.pad_token_id is not set; "
            "set it to the tokenizer's."
        )
    rows = _ended_by_padding(rows, pad_token_id)
    batch = PreferenceCollator(packing=packing, pad_token_id=pad_token_id, scores=True)(rows)
    with _probed(inner):
        return _forward_scores(model, batch.to(_vocabulary(inner).device), attention_backend).cpu()


def _own_scores(model: Any, rows: list[Row]) -> Tensor:
    inner = sequence_classifier(model)
    rows = _ended_by_padding(rows, inner.config.get_text_config().pad_token_id)
    sequences = [row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids") for row in rows]
    with _probed(inner):
        logits = [
            model(input_ids=torch.tensor([ids], device=_vocabulary(inner).device)).logits[0, 0] for ids in sequences
        ]
    return torch.stack(logits).to(accumulation_dtype(logits[0].dtype)).cpu()


def _ended_by_padding(rows: list[Row], pad_token_id: int | None) -> list[Row]:
    """One of the sequences ends with the padding token, as all do where that is the end of the text."""
    if pad_token_id is None:
        return rows
    return [{**rows[0], "rejected_ids": [*rows[0]["rejected_ids"], pad_token_id]}, *rows[1:]]


@contextmanager
def _probed(inner: Any) -> Iterator[None]:
    """Within it, the score head gives random sums of what it gets: a head that is new or zero would hide mistakes."""
    head = getattr(inner, "score", None)
    if head is None:
        yield
        return

    def projection(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        hidden = args[0].to(accumulation_dtype(args[0].dtype))
        weights = torch.randn(hidden.shape[-1], 1, generator=torch.Generator().manual_seed(0))
        return hidden @ weights.to(hidden)

    handle = head.register_forward_hook(projection)
    try:
        yield
    finally:
        handle.remove()


def _vocabulary(inner: Any) -> Tensor:
    weight: Tensor = inner.get_input_embeddings().weight
    return weight


SCORES = Compared(
    what="scores",
    unit="standard deviations",
    inner=sequence_classifier,
    vocabulary=_vocabulary,
    ours=_packed_scores,
    theirs=_own_scores,
    scale=lambda _, theirs: theirs.std().clamp(min=torch.finfo(theirs.dtype).tiny),
)
