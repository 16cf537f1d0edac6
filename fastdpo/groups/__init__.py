"""How the sequences of a batch form groups, each with one loss: pairs, ranked lists, single answers.

Log-probs of tokens are summed up into slots, numbered group by group, so that a chunk of whole groups is a range of
slots. A sequence has one slot, or two with `ld_alpha`: its tokens that both answers of the pair are long enough for,
and the rest. A group then turns its slots into what its losses are a function of (`fastdpo.losses.terms`).
"""

from fastdpo.groups.answers import Answers, mismatched_kl
from fastdpo.groups.base import KL, GroupInputs, Groups, RefLogps
from fastdpo.groups.checks import check_inputs, check_kl, check_lengths, check_reduction, looked_at
from fastdpo.groups.lists import Lists, best_first, list_sizes
from fastdpo.groups.pairs import Pairs, length_desensitized

KINDS: dict[str, type[Pairs | Lists | Answers]] = {
    "pairs": Pairs,
    "scores": Pairs,
    "lists": Lists,
    "answers": Answers,
}

__all__ = [
    "KINDS",
    "KL",
    "Answers",
    "GroupInputs",
    "Groups",
    "Lists",
    "Pairs",
    "RefLogps",
    "best_first",
    "check_inputs",
    "check_kl",
    "check_lengths",
    "check_reduction",
    "length_desensitized",
    "list_sizes",
    "looked_at",
    "mismatched_kl",
]
