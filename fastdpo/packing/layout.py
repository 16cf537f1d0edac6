"""Where each token stands in a packed row, and which keys it attends to.

The sequences of a row are laid out as a tree of their common beginnings, depth first:

    [prompt | chosen | rejected]          a pair: the prompt once, both completions behind it
    [system | prompt a | c | r | prompt b | c | r]          pairs with a common beginning, and so on, at any depth

Queries stay in place. Attention runs over segments, one for each leaf: what the leaf's path adds to the leaf before it
is the segment's queries, its whole path from the root the keys. So the first child continues its parent's segment, and
keys and values are gathered, a shared token's once for each leaf below it:

    kv_index = [prompt chosen | prompt rejected]

One call of a variable-length attention kernel, causal and aligned bottom-right, then gives every sequence exactly the
attention that it has alone. Positions are depths in the tree. Without gathering, `subtree_end` says the same: row i
sees row j where j <= i < subtree_end[j].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdpo.packing.tree import Node, Tree, build_tree


@dataclass(eq=False)  # not frozen: torch.compile would then guard on every field, the host integers too
class PackedLayout:
    """A packed row of T tokens as attention takes it: S segments, K gathered keys.

    cu_seqlens_q, cu_seqlens_k  (S + 1,) int32: where each segment's queries, and its gathered keys, begin
    max_seqlen_q, max_seqlen_k  the longest of them
    kv_index                    (K,) int64: the row of each gathered key; None where that is 0, 1, 2, ...
    kv_copies, kv_offsets       (K,), (T + 1,) int64: the gathered keys of row t are kv_copies[kv_offsets[t] :
                                kv_offsets[t + 1]], the inverse of kv_index; None with it
    subtree_end                 (T,) int64: the row after the last one that sees this row
    positions                   (T,) int64: how many keys each row sees, but for itself
    q_lengths, k_lengths        the segments' lengths as host integers
    masks                       what a backend derives from these, kept for the other layers of the same forward
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    kv_index: Tensor | None
    kv_copies: Tensor | None
    kv_offsets: Tensor | None
    subtree_end: Tensor
    positions: Tensor
    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    masks: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedLayout:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedLayout:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, fn: Any) -> PackedLayout:
        moved = {f.name: fn(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, masks={}, **moved)


@dataclass(frozen=True)
class PackedRow:
    """One packed row of T tokens with N targets, those of each sequence together, in the order they were given."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    layout: PackedLayout
    target_rows: Tensor  # (N,) the row whose hidden state predicts the target
    target_ids: Tensor  # (N,) the token to predict
    sequence_numbers: Tensor  # (N,) the sequence it belongs to
    target_counts: tuple[int, ...]  # targets of each sequence
    token_rows: tuple[np.ndarray, ...]  # the rows of each sequence's tokens
    unshared_tokens: int  # what the row would hold with nothing shared


def pack(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], share: bool = True) -> PackedRow:
    """Packs (prompt, completion) sequences of token ids into one row; without `share`, one behind the other.

    Which tokens are shared follows from the tokens alone: every common beginning of two sequences, within the prompt or
    behind it, that pays (`fastdpo.packing.tree`). A completion behind an empty prompt has no target for its first
    token: nothing predicts it.
    """
    ids, prompt_lengths = as_arrays(sequences)
    tree = build_tree(ids, share)
    input_ids = _joined([ids[node.sequence][node.begin : node.end] for node in tree.nodes])
    layout = _layout(tree, len(input_ids))

    # The rows of a sequence are the first keys of a leaf on whose path it lies.
    key_rows = _count(len(input_ids)) if layout.kv_index is None else layout.kv_index.numpy()
    key_starts = layout.cu_seqlens_k.tolist()
    path_starts = [key_starts[leaf] for leaf in tree.leaf_of_sequence]
    token_rows = tuple(
        key_rows[start : start + len(sequence)] for sequence, start in zip(ids, path_starts, strict=True)
    )
    target_rows, target_ids, counts = [], [], []
    for sequence, prompt_length, rows in zip(ids, prompt_lengths, token_rows, strict=True):
        first = min(max(prompt_length, 1), len(sequence))
        target_rows.append(rows[first - 1 : -1])
        target_ids.append(sequence[first:])
        counts.append(len(sequence) - first)
    return PackedRow(
        input_ids=torch.from_numpy(input_ids).unsqueeze(0),
        position_ids=layout.positions.unsqueeze(0),
        layout=layout,
        target_rows=torch.from_numpy(_joined(target_rows)),
        target_ids=torch.from_numpy(_joined(target_ids)),
        sequence_numbers=torch.from_numpy(np.repeat(np.arange(len(ids)), counts)),
        target_counts=tuple(counts),
        token_rows=token_rows,
        unshared_tokens=sum(map(len, ids)),
    )


def _layout(tree: Tree, num_rows: int) -> PackedLayout:
    nodes, paths = tree.nodes, tree.paths
    lengths = [node.length for node in nodes]
    starts = [0, *accumulate(lengths)]  # the row of each node's first token; depth first
    q_lengths = [0] * len(paths)
    for node, length in zip(nodes, lengths, strict=True):
        q_lengths[node.first_leaf] += length
    k_lengths = [nodes[path[-1]].end for path in paths]
    key_starts = np.array([0, *accumulate(k_lengths)])
    count = _count(max(num_rows, *k_lengths, 0))  # slices of it are cheaper than ranges
    kv_index = kv_copies = kv_offsets = None
    if key_starts[-1] != num_rows:  # every row is a key at least once: as many keys as rows is one key a row, in order
        kv_index = np.concatenate([count[starts[node] : starts[node + 1]] for path in paths for node in path])
        # A node's rows are keys of every leaf below it, there at their depth.
        leaves = [(node.first_leaf, _leaf_after(nodes, node, len(paths))) for node in nodes]
        kv_copies = np.empty(len(kv_index), dtype=np.int64)
        written = 0
        for node, (first, last) in zip(nodes, leaves, strict=True):
            copies = kv_copies[written : (written := written + node.length * (last - first))].reshape(node.length, -1)
            for leaf in range(first, last):
                np.add(count[node.begin : node.end], key_starts[leaf], out=copies[:, leaf - first])
        copies_a_row = [last - first for first, last in leaves]
        kv_offsets = np.repeat([0, *copies_a_row], [1, *lengths])
        np.cumsum(kv_offsets, out=kv_offsets)
    ends = np.array([starts[node.subtree_end] for node in nodes], dtype=np.int64)
    return PackedLayout(
        cu_seqlens_q=_cumulative(q_lengths),
        cu_seqlens_k=torch.from_numpy(key_starts.astype(np.int32)),
        max_seqlen_q=max(q_lengths, default=0),
        max_seqlen_k=max(k_lengths, default=0),
        kv_index=_tensor(kv_index),
        kv_copies=_tensor(kv_copies),
        kv_offsets=_tensor(kv_offsets),
        subtree_end=torch.from_numpy(np.repeat(ends, lengths)),
        positions=torch.from_numpy(_joined([count[node.begin : node.end] for node in nodes])),
        q_lengths=tuple(q_lengths),
        k_lengths=tuple(k_lengths),
    )


_COUNT = np.arange(1 << 16)


def _count(length: int) -> np.ndarray:
    """0, 1, 2, ..., at least `length` of them, kept from call to call, for fresh memory costs more."""
    global _COUNT
    if len(_COUNT) < length:
        _COUNT = np.arange(2 * length)
    return _COUNT


def _leaf_after(nodes: list[Node], node: Node, num_leaves: int) -> int:
    """The first leaf that is not below this node any more."""
    return nodes[node.subtree_end].first_leaf if node.subtree_end < len(nodes) else num_leaves


def as_arrays(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[list[np.ndarray], list[int]]:
    """Token ids of every sequence, and how many of them are prompt. A list that comes twice is read once."""
    known: dict[int, np.ndarray] = {}

    def array(ids: Sequence[int]) -> np.ndarray:
        if id(ids) not in known:
            known[id(ids)] = np.asarray(ids, dtype=np.int64)
        return known[id(ids)]

    parts = [(array(prompt), array(completion)) for prompt, completion in sequences]
    return [np.concatenate(part) for part in parts], [len(prompt) for prompt, _ in parts]


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


def _cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
