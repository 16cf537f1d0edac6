"""Where each token stands in a packed row, and which keys it attends to.

A group is a prompt and its completions. With sharing, the row holds the prompt once:

    [prompt | completion 0 | completion 1 | ...]      positions of each completion start at len(prompt)

Queries stay in place. Attention runs over segments: completion 0 continues the prompt's segment, every other
completion is a segment of its own whose keys are the prompt's followed by its own. So keys and values are gathered,
the prompt's once for each completion,

    kv_index = [prompt completion_0 | prompt completion_1 | ...]

and one call of a variable-length attention kernel, causal and aligned bottom-right, gives every completion exactly the
attention that it has alone behind its prompt. The last prompt token predicts the first token of every completion: its
row is named several times in `target_rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """A prompt and the completions to score behind it, as token ids."""

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]


@dataclass(frozen=True)
class PackedLayout:
    """The segments of a packed row, as variable-length attention kernels take them.

    cu_seqlens_q, cu_seqlens_k  (segments + 1,) int32: where each segment's queries, and its gathered keys, begin
    kv_index                    (keys,) int64: the row of each gathered key; None where that is 0, 1, 2, ...
    q_lengths, k_lengths        the same lengths as host integers
    masks                       what a backend derives from the lengths, kept for the other layers of the same forward
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    kv_index: Tensor | None
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    masks: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def max_seqlen_q(self) -> int:
        return max(self.q_lengths)

    @property
    def max_seqlen_k(self) -> int:
        return max(self.k_lengths)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedLayout:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedLayout:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, fn: Any) -> PackedLayout:
        moved = {f.name: fn(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, masks={}, **moved)


@dataclass(frozen=True)
class PackedRow:
    """One packed row of T tokens with N targets. Completions are numbered through, group by group."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    layout: PackedLayout
    target_rows: Tensor  # (N,) the row whose hidden state predicts the target
    target_ids: Tensor  # (N,) the token to predict
    completion_ids: Tensor  # (N,) the completion it belongs to
    unshared_tokens: int  # what the row would hold with every prompt repeated


def pack(groups: Sequence[Group], share: bool = True) -> PackedRow:
    """Packs all groups into one row; without `share`, the prompt is repeated before each of its completions.

    A completion behind an empty prompt has no target for its first token: nothing predicts it.
    """
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    keys: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    target_counts: list[int] = []
    q_lengths: list[int] = []
    k_lengths: list[int] = []
    end = 0  # rows so far
    unshared = 0
    for group in groups:
        prompt = np.asarray(group.prompt, dtype=np.int64)
        prompt_start = end
        for number, completion_ids in enumerate(group.completions):
            completion = np.asarray(completion_ids, dtype=np.int64)
            unshared += len(prompt) + len(completion)
            first_of_prompt = number == 0 or not share
            if first_of_prompt:
                prompt_start = end
                ids.append(prompt)
                positions.append(np.arange(len(prompt)))
                end += len(prompt)
            start = end
            ids.append(completion)
            positions.append(np.arange(len(prompt), len(prompt) + len(completion)))
            end += len(completion)
            own_rows = np.arange(start, end)
            prompt_rows = np.arange(prompt_start, prompt_start + len(prompt))
            predictors = np.concatenate([prompt_rows[-1:], own_rows[:-1]]) if len(completion) else own_rows
            rows.append(predictors)
            targets.append(completion[len(completion) - len(predictors) :])
            target_counts.append(len(predictors))
            q_length = len(completion) + (len(prompt) if first_of_prompt else 0)
            if q_length:
                q_lengths.append(q_length)
                k_lengths.append(len(prompt) + len(completion))
                keys.extend((prompt_rows, own_rows))
    kv_index = _joined(keys)
    identity = len(kv_index) == end  # every row is a key at least once, in order: as many keys as rows is the identity
    layout = PackedLayout(
        cu_seqlens_q=_cumulative(q_lengths),
        cu_seqlens_k=_cumulative(k_lengths),
        kv_index=None if identity else torch.from_numpy(kv_index),
        q_lengths=tuple(q_lengths),
        k_lengths=tuple(k_lengths),
    )
    return PackedRow(
        input_ids=torch.from_numpy(_joined(ids)).unsqueeze(0),
        position_ids=torch.from_numpy(_joined(positions)).unsqueeze(0),
        layout=layout,
        target_rows=torch.from_numpy(_joined(rows)),
        target_ids=torch.from_numpy(_joined(targets)),
        completion_ids=torch.from_numpy(np.repeat(np.arange(len(target_counts)), target_counts)),
        unshared_tokens=unshared,
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32))
