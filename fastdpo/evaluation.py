"""What a model prefers and what it says: the before and after of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from fastdpo.models import causal_lm, evaluating, position_limit
from fastdpo.packing import PreferenceCollator
from fastdpo.scoring import completion_logps

PAIRS_PER_PASS = 8


@dataclass(frozen=True)
class Preference:
    """accuracy: share of pairs whose chosen answer has the higher log-prob a token; margin: mean difference, nats."""

    accuracy: float
    margin: float
    pairs: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_preference(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_length: int | None = None,
    packing: str = "prefix",
    normalize: bool = True,
    description: str = "measuring preference",
    progress: bool = True,
) -> Preference:
    """How often and by how much `model` prefers `chosen`: log pi(chosen|prompt) against log pi(rejected|prompt).

    Args:
        rows: tokenized (`prompt_ids`, `chosen_ids`, `rejected_ids`).
        normalize: divide each sum of log-probs by its completion's tokens, so that length decides nothing.
    """
    collator = PreferenceCollator(max_length=max_length)
    margins: list[float] = []
    with evaluating(model):
        starts = range(0, len(rows), PAIRS_PER_PASS)
        for start in tqdm(starts, desc=description, unit="batch", disable=not progress, leave=False):
            pairs = [collator.sequences(row) for row in rows[start : start + PAIRS_PER_PASS]]
            sequences = [sequence for pair in pairs for sequence in pair]
            scores = [
                float(logps.mean() if normalize else logps.sum())
                for logps in completion_logps(model, sequences, packing=packing)
            ]
            margins += [chosen - rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]
    accuracy = sum(margin > 0 for margin in margins) / max(1, len(margins))
    return Preference(accuracy, sum(margins) / max(1, len(margins)), len(margins))


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Any], *, max_new_tokens: int = 48, progress: bool = True,
    description: str = "generating", max_length: int | None = None,
) -> list[str]:  # fmt: skip
    """The model's greedy answer to each prompt (messages or text), of which the end stays where it is too long."""
    ids = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids.append(tokenizer(prompt)["input_ids"])
        else:
            rendered = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
            ids.append(rendered["input_ids"])
    return generate_from_ids(
        model, tokenizer, ids, max_new_tokens=max_new_tokens, progress=progress, description=description,
        max_length=max_length,
    )  # fmt: skip


def generate_from_ids(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 48, progress: bool = True,
    description: str = "generating", max_length: int | None = None,
) -> list[str]:  # fmt: skip
    """The same for prompts of token ids.

    Args:
        max_length: of a prompt's tokens; prompt and answer together have at most the model's positions.
    """
    inner = causal_lm(model)
    limit = position_limit(inner)
    if limit is not None:
        max_new_tokens = min(max_new_tokens, max(1, limit.tokens // 2))
        room = max(1, limit.tokens - max_new_tokens)
        max_length = room if max_length is None else min(max_length, room)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    answers = []
    with evaluating(model), torch.no_grad():
        for prompt in tqdm(prompts, desc=description, unit="answer", disable=not progress, leave=False):
            kept = list(prompt) if max_length is None else list(prompt)[-max_length:]
            ids = torch.tensor([kept], device=inner.device)
            out = inner.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, do_sample=False,
                use_cache=True, pad_token_id=pad,
            )  # fmt: skip
            answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers
