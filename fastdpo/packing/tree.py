"""The tree of the common beginnings of token sequences: which tokens of a packed row are run once.

Found by sorting: neighbours in lexicographic order have the longest common prefixes.

A row either shares every common beginning or none. Attention gathers the keys and values of a row that shares in one
piece: as many as the sequences of the row have tokens, however many of them are shared, so that once one beginning is
shared, sharing the others costs nothing more. What sharing saves is the backbone's work on the repeated tokens. It pays
where a saved token is worth `KEYS_PER_TOKEN` gathered keys: with layers of 12 D^2 weights and D_kv channels of keys,
running a token costs 72 D^2 FLOPs forward and backward; gathering a key moves some 20 D_kv bytes (bf16: key and value
read and written, gradients read, added and written). For the shapes of SmolLM2-135M and Llama 3.1 8B, on a GPU of 790
TFLOP/s and 4.3 TB/s, that is a ratio of 34 and 320. So a row shares where at least one token in 32 is a repeated one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

KEYS_PER_TOKEN = 32


@dataclass(eq=False)
class Node:
    """Tokens [begin, end) of a sequence, run once for all sequences below."""

    sequence: int
    begin: int
    end: int
    children: list[Node] = field(default_factory=list)
    ending: list[int] = field(default_factory=list)  # the sequences that end with this node
    # Of its place in the tree, depth first:
    number: int = -1
    subtree_end: int = -1  # the number of the node after its last descendant
    first_leaf: int = -1  # the first leaf below it, itself perhaps

    @property
    def length(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Tree:
    """nodes depth first; for each leaf the numbers of the nodes on its path; for each sequence a leaf whose path begins
    with it. Empty sequences have no node, and a leaf that says nothing."""

    nodes: list[Node]
    paths: list[list[int]]
    leaf_of_sequence: list[int]


class SortedSequences:
    """Token sequences (1-D int64) in lexicographic order: their tree, and the tokens that any run of them takes.

    Both come from here, so that a batch is cut by the tokens that its packed rows really hold.
    """

    def __init__(self, sequences: Sequence[np.ndarray]) -> None:
        keys = [ids.astype(">u4").tobytes() for ids in sequences]  # big-endian: bytes sort as the ids do
        self.lengths = [len(ids) for ids in sequences]
        self._order = [number for number in sorted(range(len(keys)), key=keys.__getitem__) if self.lengths[number]]
        self._common = [
            0 if place == 0 else _common_prefix(sequences[self._order[place - 1]], sequences[number])
            for place, number in enumerate(self._order)
        ]  # tokens in common with the sequence before

    def num_tokens(self, first: int = 0, end: int | None = None) -> int:
        """Tokens that the sequences numbered [first, end) take in one row: the nodes' lengths of their tree."""
        unshared, shared = self._unshared_and_shared(self._run(first, end))
        return shared if pays(unshared - shared, unshared) else unshared

    def fewest_tokens(self, first: int = 0, end: int | None = None) -> int:
        """`num_tokens` were every beginning shared, paying or not: never more, and never less for a longer run."""
        return self._unshared_and_shared(self._run(first, end))[1]

    def unshared_tokens(self) -> int:
        """`num_tokens` of all were no beginning shared, but for sequences that another begins with."""
        return self._unshared_and_shared(self._run(0, None))[0]

    def tree(self) -> Tree:
        """First come, first placed."""
        run = self._run(0, None)
        unshared, shared = self._unshared_and_shared(run)
        if not pays(unshared - shared, unshared):
            # A sequence that another begins with lies within it at no price: there is nothing to gather for it.
            lengths = [0, *(self.lengths[number] for number, _ in run)]
            run = [
                (number, common if common == before else 0)
                for (number, common), before in zip(run, lengths, strict=False)
            ]
        root = Node(-1, 0, 0)
        _insert(root, [(number, self.lengths[number], common) for number, common in run])
        return _depth_first(root, len(self.lengths))

    def _run(self, first: int, end: int | None) -> list[tuple[int, int]]:
        """Of the sequences [first, end), without empty ones, in order: number, and tokens in common with the last."""
        if first == 0 and end is None:
            return list(zip(self._order, self._common, strict=True))
        end = len(self.lengths) if end is None else end
        run: list[tuple[int, int]] = []
        common = 0
        for number, with_last in zip(self._order, self._common, strict=True):
            common = min(common, with_last)
            if first <= number < end:
                run.append((number, common))
                common = self.lengths[number]
        return run

    def _unshared_and_shared(self, run: Sequence[tuple[int, int]]) -> tuple[int, int]:
        """Tokens with no beginning shared, but for sequences that another begins with, and with all of them shared."""
        unshared = shared = before = 0
        for number, common in run:
            length = self.lengths[number]
            unshared += length - (before if common == before else 0)
            shared += length - common
            before = length
        return unshared, shared


def build_tree(sequences: Sequence[np.ndarray], share: bool) -> Tree:
    """The tree of token sequences (1-D int64), or without `share` each for itself; first come, first placed."""
    if share:
        return SortedSequences(sequences).tree()
    root = Node(-1, 0, 0)
    root.children = [Node(number, 0, len(ids), ending=[number]) for number, ids in enumerate(sequences) if len(ids)]
    return _depth_first(root, len(sequences))


def pays(saved: int, gathered: int) -> bool:
    """Whether tokens that need not be run are worth the keys to be gathered for it."""
    return saved * KEYS_PER_TOKEN >= gathered


def _insert(root: Node, sequences: Sequence[tuple[int, int, int]]) -> None:
    """Puts sorted sequences into the tree: the number of each, its length, and its tokens in common with the last."""
    path = [root]  # to the last leaf
    for number, length, common in sequences:
        while path[-1].begin >= common and len(path) > 1:
            path.pop()
        parent = path[-1]
        if parent.end > common:  # the two part inside this node
            rest = Node(parent.sequence, common, parent.end, parent.children, parent.ending)
            parent.end, parent.children, parent.ending = common, [rest], []
        if length == common:  # a sequence that sorts behind its equal
            parent.ending.append(number)
            continue
        leaf = Node(number, common, length, ending=[number])
        parent.children.append(leaf)
        path.append(leaf)


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


def _parents_first(root: Node) -> list[Node]:
    nodes = [root]
    for node in nodes:  # grows while it is walked
        nodes += node.children
    return nodes


def _depth_first(root: Node, num_sequences: int) -> Tree:
    """Numbers the nodes, branches in the order in which the first sequence of each was given."""
    first: dict[Node, int] = {}
    for node in reversed(_parents_first(root)):
        node.children.sort(key=first.__getitem__)
        known = [*node.ending[:1], *(first[child] for child in node.children[:1])]
        first[node] = min(known, default=-1)

    nodes: list[Node] = []
    paths: list[list[int]] = []
    leaf_of_sequence = [0] * num_sequences
    path: list[Node] = []
    waiting = [(child, 0) for child in reversed(root.children)]
    while waiting:
        node, depth = waiting.pop()
        for finished in path[depth:]:
            finished.subtree_end = len(nodes)
        del path[depth:]
        node.number, node.first_leaf = len(nodes), len(paths)
        nodes.append(node)
        path.append(node)
        for sequence in node.ending:
            leaf_of_sequence[sequence] = len(paths)
        if not node.children:
            paths.append([each.number for each in path])
        waiting += [(child, depth + 1) for child in reversed(node.children)]
    for node in path:
        node.subtree_end = len(nodes)
    return Tree(nodes, paths, leaf_of_sequence)
