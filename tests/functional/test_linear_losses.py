"""linear_loss against full logits and float64: every loss and option, every layout of the rows, every way to go.

The truth is a second implementation: log-softmax in float64, a Python loop over the tokens of each sequence for their
sum, LD-DPO and WPO from their papers, and then fastdpo.preference_loss and its siblings on those float64 sums.
"""

import random
from dataclasses import dataclass

import pytest
import torch
from drawing import pairwise
from torch.utils._python_dispatch import TorchDispatchMode

import fastdpo
import fastdpo.functional
from fastdpo.losses import REGISTRY

V, D, T, BETA = 37, 6, 8, 0.3
# Rows of logits that the budget holds: all of them; two or three groups; less than any larger group.
BUDGETS = {"all": 10**4, "groups": 15, "tile": 3}
WAYS = ("padded", "counted", "shuffled")
# Each way and each budget once; `test_every_loss` has all of them.
TOGETHER = [("padded", "all"), ("padded", "groups"), ("counted", "tile"), ("shuffled", "groups")]
NAMES = [name for name, spec in REGISTRY.items() if spec.data != "scores"]
PAIRED = [name for name in NAMES if REGISTRY[name].data == "pairs"]
REQUIRED = {"exo_pair": {"label_smoothing": 1e-2}}
# Losses that neither option touches, alone or in a mix: written out, not asked of the registry.
WITHOUT_LD = {"sft", "orpo", "simpo", "alphapo", "cpo"}
DIVERGING = {"sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "listwise"}
WITHOUT_WPO = {"sft", "orpo", "cpo", "aot", "aot_unpaired"}


@dataclass
class Batch:
    """S sequences: hidden (S, T, D); labels (S, T) unshifted; spans of positions that packed input has rows of."""

    data: str
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    labels: torch.Tensor
    spans: list
    refs: torch.Tensor
    arguments: dict  # list_sizes, desirable
    own: int  # sequences that have a loss; those behind are answers to other prompts

    @property
    def groups(self):
        """The sequences of each pair, list or answer."""
        if self.data == "pairs":
            return [(i, self.own // 2 + i) for i in range(self.own // 2)]
        if self.data == "answers":
            return [(i,) for i in range(self.own)]
        sizes = self.arguments["list_sizes"]
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        return [tuple(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]

    def targets(self, sequence):
        """Positions of its labels that count: what stands first has nothing that predicts it."""
        return [t for t in range(1, T) if self.labels[sequence, t] != -100]

    @property
    def leaves(self):
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor.requires_grad]


def batch_of(data, dtype=torch.float64, seed=0, trained="hidden weight bias", others=False, sizes=(2, 5, 3)):
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    own = {"pairs": 8, "lists": sum(sizes), "answers": 5}[data]
    count = 2 * own if others else own
    labels, spans = torch.full((count, T), -100), []
    for sequence in range(count):
        start, length = draw.randint(1, 2), draw.randint(1, 6)
        if sequence == 0:
            start, length = 0, 6  # a label at position 0
        spans.append(range(max(1, start), min(T, start + length)))
        labels[sequence, start : start + length] = torch.randint(V, (T,), generator=generator)[: min(length, T - start)]
        if len(spans[-1]) > 2 and sequence % 2 == 0:
            labels[sequence, spans[-1][1]] = -100  # a hole
    tensors = {
        "hidden": torch.randn(count, T, D, generator=generator, dtype=torch.float64),
        "weight": torch.randn(V, D, generator=generator, dtype=torch.float64),
        "bias": torch.randn(V, generator=generator, dtype=torch.float64),
    }
    for name, tensor in tensors.items():
        tensors[name] = tensor.to(dtype).requires_grad_(name in trained.split())
    arguments = {"lists": {"list_sizes": sizes}, "answers": {"desirable": torch.arange(own) % 3 != 1}}.get(data, {})
    batch = Batch(data, **tensors, labels=labels, spans=spans, refs=torch.empty(0), arguments=arguments, own=own)
    lengths = torch.tensor([len(batch.targets(sequence)) for sequence in range(count)])
    batch.refs = -4.0 * lengths + 3 * torch.randn(count, generator=generator)
    return batch


def dealt(cases):
    """Each case in two of the ways that `TOGETHER` has, in turn."""
    return [
        (*case, *TOGETHER[way % len(TOGETHER)])
        for number, case in enumerate(cases)
        for way in (number, number + 1 + number // len(TOGETHER) % 3)
    ]


# The truth.


def token_numbers(batch):
    """Of each sequence, its tokens' log p (n,) and log sum_v p_v^2 (n,), in float64."""
    logits = batch.hidden.double() @ batch.weight.double().T + batch.bias.double()
    logps = logits - logits.exp().sum(-1, keepdim=True).log()
    tokens, squares = [], []
    for sequence in range(len(batch.labels)):
        at = batch.targets(sequence)
        rows = logps[sequence, [t - 1 for t in at]]
        tokens.append(rows[range(len(at)), batch.labels[sequence, at]])
        squares.append(rows.exp().square().sum(-1).log())
    return tokens, squares


def sums_of(tokens, ld_alpha=None):
    """(S,); with ld_alpha, of pairs: tokens from the position of the shorter answer's length on weigh so much."""
    if ld_alpha is None:
        return torch.stack([values.sum() for values in tokens])
    half, sums = len(tokens) // 2, []
    for sequence, values in enumerate(tokens):
        shorter = min(len(values), len(tokens[(sequence + half) % len(tokens)]))
        sums.append(
            sum(
                ((1.0 if i < shorter else ld_alpha) * value for i, value in enumerate(values)), start=0.0 * values.sum()
            )
        )
    return torch.stack(sums)


def policy_weights_of(tokens, squares):
    """(B,) WPO: exp(mean_t(log p_t - log sum_v p_v^2)) of chosen times that of rejected, a constant."""
    aligned = [(t - s).detach().mean() if len(t) else torch.tensor(0.0) for t, s in zip(tokens, squares, strict=True)]
    half = len(tokens) // 2
    return torch.stack([aligned[i].exp() * aligned[half + i].exp() for i in range(half)]).double()


def true_losses(
    batch, names, refs, weights=None, pair_weights=None, kl=None, ld_alpha=None, use_weighting=False, **options
):
    """(B,) of losses, times pair_weights, in float64."""
    tokens, squares = token_numbers(batch)
    lengths = torch.tensor([float(len(values)) for values in tokens]).double()
    plain, total = sums_of(tokens), 0.0
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        spec = REGISTRY[name]
        known = {option: value for option, value in options.items() if option in spec.honours}
        common = {"beta": BETA, "loss_type": name, "reduction": "none", "pair_weights": pair_weights, **known}
        if batch.data == "pairs":
            sums = plain if name in WITHOUT_LD else sums_of(tokens, ld_alpha)
            chosen, rejected = sums.chunk(2)
            ref = (None, None) if refs is None else refs.double().chunk(2)
            of = dict(zip(("chosen_lengths", "rejected_lengths"), lengths.chunk(2), strict=True))
            losses = fastdpo.preference_loss(chosen, rejected, *ref, **of, **common).losses
            if use_weighting and name not in WITHOUT_WPO:
                losses = losses * policy_weights_of(tokens, squares)
        elif batch.data == "lists":
            ref = None if refs is None else refs.double()
            losses = fastdpo.listwise_loss(plain, ref, **batch.arguments, **common).losses
        else:
            ref = refs.double()
            if spec.needs_kl and kl is None:
                estimate = {"kl_logps": plain[batch.own :], "ref_kl_logps": ref[batch.own :]}
            else:
                estimate = {"kl": kl} if spec.needs_kl else {}
            losses = fastdpo.unpaired_loss(
                plain[: batch.own], ref[: batch.own], **batch.arguments, **estimate, **common
            ).losses
        total = total + weight * losses
    return total


def reduced(losses, reduction, pair_weights=None):
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (len(losses) if pair_weights is None else pair_weights.double().sum())


# What is tested.


def rows_of(batch, way, seed=1):
    """[(sequence, position)] in the order of packed input, those of a sequence in its order; rows of each group."""
    draw = random.Random(seed)
    rest = [(sequence,) for sequence in range(batch.own, len(batch.labels))]
    parts = [*batch.groups, [sequence for (sequence,) in rest]]
    if way == "shuffled":
        parts = [[sequence for part in parts for sequence in part]]
    order, counts = [], []
    for part in parts:
        left = {sequence: list(batch.spans[sequence]) for sequence in part}
        mixed = [sequence for sequence in part for _ in left[sequence]]
        draw.shuffle(mixed)
        order += [(sequence, left[sequence].pop(0)) for sequence in mixed]
        counts.append(len(mixed))
    return order, counts[: len(batch.groups)] if way == "counted" else None


def laid_out(batch, way):
    """hidden, labels and keyword arguments of linear_loss."""
    if way == "padded":
        return batch.hidden, batch.labels, {}
    order, counts = rows_of(batch, way)
    sequences, positions = (torch.tensor(column) for column in zip(*order, strict=True))
    arguments = {"sequence_ids": sequences} | ({} if counts is None else {"tokens_per_pair": counts})
    return batch.hidden[sequences, positions - 1], batch.labels[sequences, positions], arguments


def spans_size(batch, way):
    """Rows that go through the head for the loss."""
    if way == "padded":
        return sum(len(batch.targets(sequence)) for sequence in range(batch.own))
    return sum(map(len, batch.spans[: batch.own]))


@pytest.fixture
def fused(monkeypatch):
    """A list that grows by one where the gradient is formed in the forward."""
    calls, original = [], fastdpo.functional.fused_group_loss

    def counting(*args, **options):
        calls.append(1)
        return original(*args, **options)

    monkeypatch.setattr(fastdpo.functional, "fused_group_loss", counting)
    return calls


def close(got, wanted, dtype):
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(got.double(), wanted.double(), **tolerance, equal_nan=True)


def check(batch, names, way, budget, fused, reduction="mean", refs="tensor", loss_weights=None, kl=None, **options):
    """linear_loss, loss and the truth: losses, gradients, and all that the output holds."""
    names = [names] if isinstance(names, str) else names
    dtype = batch.weight.dtype
    wanted = {"tensor": batch.refs, "pair": batch.refs, "none": None}[refs]
    given = tuple(batch.refs.chunk(2)) if refs == "pair" else wanted
    for name in names:
        options = REQUIRED.get(name, {}) | options
    exact = true_losses(batch, names, wanted, loss_weights, kl=kl, **options)
    outer = torch.linspace(-1.7, 0.9, len(exact)).double() if reduction == "none" else torch.tensor(-1.7).double()
    total = (outer * reduced(exact, reduction, options.get("pair_weights"))).sum()
    arguments = {"beta": BETA, "loss_type": names, "loss_weights": loss_weights, "reduction": reduction, "kl": kl}
    arguments |= batch.arguments | options
    hidden, labels, rows = laid_out(batch, way)
    logits = hidden @ batch.weight.T + batch.bias
    plain = fastdpo.loss(logits, labels, given, sequence_ids=rows.get("sequence_ids"), **arguments)
    out = fastdpo.linear_loss(
        hidden, batch.weight, labels, given, bias=batch.bias, memory_budget=BUDGETS[budget] * V * dtype.itemsize,
        **rows, **arguments,
    )  # fmt: skip
    per_pair = all(REGISTRY[name].per_pair for name in names) and reduction != "none"
    trainable = batch.weight.requires_grad or batch.bias.requires_grad
    assert len(fused) == (per_pair and trainable and spans_size(batch, way) > BUDGETS[budget])
    for found in (plain, out):
        close(found.losses.detach(), exact.detach(), dtype)
        close((outer * found.loss).sum().detach(), total.detach(), dtype)
        if not batch.leaves:
            assert not found.loss.requires_grad
            continue
        got = torch.autograd.grad((outer * found.loss).sum(), batch.leaves, retain_graph=found is plain)
        for a, b in zip(got, torch.autograd.grad(total, batch.leaves, retain_graph=True), strict=True):
            close(a, b, dtype)
    assert out.losses.requires_grad == (reduction == "none" and bool(batch.leaves))
    for field in ("chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards"):
        close(getattr(out, field), getattr(plain, field), dtype)
        assert not getattr(out, field).requires_grad
    ours, theirs = out.metrics(), plain.metrics()
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        close(value, theirs[key], dtype)
    return out


CASES = pairwise(WAYS, list(BUDGETS), [torch.float64, torch.float32])


@pytest.mark.parametrize("way, budget, dtype", CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_loss(name, way, budget, dtype, fused):
    spec = REGISTRY[name]
    batch = batch_of(spec.data, dtype, others=spec.needs_kl)
    check(batch, name, way, budget, fused, refs="tensor" if spec.needs_reference else "none")


DIVERGENCES = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    *({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": c} for c in (0.0, 0.5, 1.0, 2.0)),
]
OPTIONS = [
    *(("sigmoid", one) for one in DIVERGENCES),
    *((name, DIVERGENCES[0]) for name in ("hinge", "ipo", "exo_pair", "robust", "sigmoid_norm", "listwise")),
    *((name, DIVERGENCES[1]) for name in ("discopop", "listwise")),
    ("listwise", DIVERGENCES[4]),
    *(("sigmoid", {"ld_alpha": alpha}) for alpha in (0, 0.3, 1)),
    *((name, {"ld_alpha": 0.3}) for name in PAIRED if name not in WITHOUT_LD | {"sigmoid"}),
    *((name, {"use_weighting": True}) for name in PAIRED if name not in WITHOUT_WPO),
    *((name, {"label_smoothing": 0.2}) for name in ("sigmoid", "exo_pair", "robust", "aot", "aot_unpaired")),
    *((name, {"label_smoothing": 0.2}) for name in ("simpo", "cpo")),
    ("sigmoid", {"label_smoothing": 0.5}),
    ("discopop", {"discopop_tau": 0.7}),
    ("dpop", {"dpop_lambda": 2.0}),
    ("simpo", {"simpo_gamma": 1.5}),
    ("alphapo", {"alphapo_alpha": 0.1, "simpo_gamma": 0.2}),
    ("cpo", {"cpo_alpha": 0.0}),
    ("cpo", {"cpo_alpha": 2.5}),
    ("kto", {"desirable_weight": 0.7, "undesirable_weight": 1.3}),
    ("apo_zero_unpaired", {"desirable_weight": 0.0, "undesirable_weight": 1.3}),
    ("sigmoid", {"ld_alpha": 0.3, "use_weighting": True, "label_smoothing": 0.1} | DIVERGENCES[0]),
    ("ipo", {"ld_alpha": 0.3, "use_weighting": True} | DIVERGENCES[1]),
]


@pytest.mark.parametrize("name, options, way, budget", dealt(OPTIONS), ids=str)
def test_options(name, options, way, budget, fused):
    spec = REGISTRY[name]
    batch = batch_of(spec.data, seed=2, others=spec.needs_kl)
    check(batch, name, way, budget, fused, refs="tensor" if spec.needs_reference else "none", **options)


MIXES = [
    (["sigmoid", "sft"], None),
    (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.5]),
    (["sft", "hinge"], [1.0, -0.5]),
    (["sigmoid", "simpo"], None),
    (["sigmoid", "cpo"], [0.5, 0.5]),
    (["nca_pair", "orpo"], [2.0, 0.1]),
    (["aot", "sft"], None),
    (["sigmoid", "nca_pair"], [1.0, 0.0]),
]


PIECES = [{}, {"ld_alpha": 0.3}, {"use_weighting": True}, DIVERGENCES[0] | {"ld_alpha": 0, "use_weighting": True}]


@pytest.mark.parametrize(
    "names, loss_weights, options, way, budget", dealt([(*mix, pieces) for mix in MIXES for pieces in PIECES]), ids=str
)
def test_mixes(names, loss_weights, options, way, budget, fused):
    """What an option does not act on stays as it is: the NLL of `sft` is neither LD-DPO's nor WPO's."""
    refused = "use_weighting" in options and WITHOUT_WPO.issuperset(names)
    refused |= "f_divergence_type" in options and not DIVERGING.union(WITHOUT_LD).issuperset(names)
    if refused:
        with pytest.raises(ValueError, match="has no meaning for"):
            check(batch_of("pairs"), names, way, budget, fused, loss_weights=loss_weights, **options)
        return
    check(batch_of("pairs", seed=3), names, way, budget, fused, loss_weights=loss_weights, **options)


@pytest.mark.parametrize("names, reduction, weighted, together", pairwise(
    [["sigmoid", "sft"], ["orpo"], ["ipo"], ["sigmoid_norm", "cpo"], ["listwise"], ["kto"]],
    ["mean", "sum", "none"],
    [False, True],
    TOGETHER,
), ids=str)  # fmt: skip
def test_reductions_and_pair_weights(names, reduction, weighted, together, fused):
    way, budget = together
    data = REGISTRY[names[0]].data
    batch = batch_of(data, seed=4, others=data == "answers")
    weights = torch.tensor([0.5, 0.0, 2.0, 1.25, 0.3])[: len(batch.groups)] if weighted else None
    refs = "tensor" if REGISTRY[names[0]].needs_reference else "none"
    check(batch, names, way, budget, fused, reduction, refs, pair_weights=weights)


@pytest.mark.parametrize("options", [{"use_weighting": True}, {"ld_alpha": 0.3}])
@pytest.mark.parametrize("way, budget", TOGETHER)
def test_pair_weights_beside_the_weights_of_wpo(options, way, budget, fused):
    weights = torch.tensor([0.5, 0.0, 2.0, 1.25])
    check(batch_of("pairs"), ["sigmoid", "sft"], way, budget, fused, pair_weights=weights, **options)


@pytest.mark.parametrize("loss, trained, together", pairwise(
    [(["sigmoid", "sft"], {"ld_alpha": 0.3, "use_weighting": True}), (["aot"], {}), (["listwise"], {}), (["kto"], {})],
    ["hidden", "weight", "bias", "hidden weight", "weight bias", ""],
    TOGETHER,
), ids=str)  # fmt: skip
def test_what_is_trained(loss, trained, together, fused):
    (names, options), (way, budget) = loss, together
    data = REGISTRY[names[0]].data
    batch = batch_of(data, seed=5, trained=trained, others=data == "answers")
    check(batch, names, way, budget, fused, **options)


@pytest.mark.parametrize("way, budget", TOGETHER)
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "aot", "sft", "simpo"])
def test_references_as_a_pair(name, way, budget, fused):
    """References given to a loss that needs none move its rewards at most."""
    out = check(batch_of("pairs"), name, way, budget, fused, refs="pair")
    if name == "sft":
        fused.clear()
        other = check(batch_of("pairs"), name, way, budget, fused, refs="none")
        torch.testing.assert_close(out.losses, other.losses)


@pytest.mark.parametrize("way, budget", TOGETHER)
@pytest.mark.parametrize(
    "names", [[name] for name in NAMES if "reference_free" in REGISTRY[name].pieces] + [["sigmoid", "sft"]], ids=str
)
def test_reference_free(names, way, budget, fused):
    batch = batch_of(REGISTRY[names[0]].data)
    out = check(batch, names, way, budget, fused, refs="none", reference_free=True)
    batch.refs = torch.zeros_like(batch.refs)
    with_zeros = true_losses(batch, names, batch.refs, **REQUIRED.get(names[0], {}))
    close(out.losses.detach(), with_zeros.detach(), torch.float64)


@pytest.mark.parametrize("way, budget", TOGETHER)
@pytest.mark.parametrize("sizes", [(2, 2), (5,), (5, 2, 3, 2), (3, 3, 3)], ids=str)
def test_lists(sizes, way, budget, fused):
    batch = batch_of("lists", seed=6, sizes=sizes)
    out = check(batch, "listwise", way, budget, fused)
    tokens, _ = token_numbers(batch)
    rewards = BETA * (sums_of(tokens) - batch.refs)
    for group, chosen, rejected, share in zip(
        batch.groups, out.chosen_rewards, out.rejected_rewards, out.accuracies, strict=True
    ):
        best, *others = (rewards[sequence].item() for sequence in group)
        assert chosen.item() == pytest.approx(best)
        assert rejected.item() == pytest.approx(sum(others) / len(others))
        both = [(a, b) for i, a in enumerate(group) for b in group[i + 1 :]]
        assert share.item() == pytest.approx(sum((rewards[a] > rewards[b]).item() for a, b in both) / len(both))
    if len(set(sizes)) == 1:
        batch.arguments = {"list_sizes": sizes[0]}
        hidden, labels, rows = laid_out(batch_of("lists", seed=6, sizes=sizes), way)
        again = fastdpo.linear_loss(
            hidden, batch.weight, labels, batch.refs, bias=batch.bias, beta=BETA, loss_type="listwise", **rows,
            **batch.arguments,
        )  # fmt: skip
        close(again.losses, out.losses, torch.float64)


@pytest.mark.parametrize("way, budget", TOGETHER)
@pytest.mark.parametrize(
    "name, others, kl",
    [
        ("kto", True, None),
        ("kto", True, 0.7),  # the answers to other prompts have no part
        ("kto", True, torch.tensor(-3.0)),  # taken as 0
        ("kto", False, 0.7),
        ("apo_zero_unpaired", True, None),
        ("apo_zero_unpaired", False, None),
    ],
)
def test_answers(name, others, kl, way, budget, fused):
    batch = batch_of("answers", seed=7, others=others)
    out = check(batch, name, way, budget, fused, kl=kl)
    desirable = batch.arguments["desirable"]
    assert out.chosen_logps.isnan().equal(~desirable) and out.rejected_rewards.isnan().equal(desirable)
    if name == "kto":
        tokens, _ = token_numbers(batch)
        differences = (sums_of(tokens) - batch.refs)[batch.own :].detach()
        wanted = differences.mean() if kl is None else kl
        assert out.kl.item() == pytest.approx(max(0.0, float(wanted)), abs=1e-9)
        assert not out.kl.requires_grad
    else:
        assert out.kl is None


@pytest.mark.parametrize("way, budget", TOGETHER)
@pytest.mark.parametrize("names", [["sft"], ["cpo"], ["orpo"], ["sigmoid", "sft"], ["ipo", "sft"]], ids=str)
@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.3}, {"use_weighting": True}])
@pytest.mark.parametrize("weighted", [False, True])
def test_parts_add_up_with_the_mean_length_of_the_whole(names, options, weighted, way, budget):
    """Gradient accumulation: two parts of a batch, each with reduction "sum"."""
    if len(names) == 1 and options:
        options = {}
    batch = batch_of("pairs", seed=8)
    count = batch.own // 2
    weights = torch.tensor([0.5, 1.0, 2.0, 1.25]) if weighted else torch.ones(count)
    whole = true_losses(batch, names, batch.refs, pair_weights=weights, **options).sum()
    lengths = torch.tensor([len(batch.targets(sequence)) for sequence in range(count)])
    mean_length = ((weights * lengths).sum().double() / weights.sum().double()).item()
    total = 0.0
    for part in ([0, 1, 2], [3]):
        rows = [*part, *(count + pair for pair in part)]
        piece = Batch(
            "pairs", batch.hidden[rows], batch.weight, batch.bias, batch.labels[rows], [batch.spans[i] for i in rows],
            batch.refs[rows], {}, len(rows),
        )  # fmt: skip
        hidden, labels, arguments = laid_out(piece, way)
        total = total + fastdpo.linear_loss(
            hidden, piece.weight, labels, piece.refs, bias=piece.bias, reduction="sum", beta=BETA, loss_type=names,
            pair_weights=weights[part] if weighted else None, memory_budget=BUDGETS[budget] * V * 8,
            mean_chosen_length=mean_length, **arguments, **options,
        ).loss  # fmt: skip
    close(total.detach(), whole.detach(), torch.float64)
    for got, wanted in zip(
        torch.autograd.grad(total, batch.leaves), torch.autograd.grad(whole, batch.leaves), strict=True
    ):
        close(got, wanted, torch.float64)


@pytest.mark.parametrize("way, budget", TOGETHER)
@pytest.mark.parametrize("empty", [0, 1, 2, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_nll_is_the_mean_over_tokens(empty, weighted, way, budget):
    """However few of them there are, as where truncation has left most chosen answers without a token."""
    batch = batch_of("pairs", seed=8)
    batch.labels[: empty + 1] = -100
    batch.labels[0, 2] = 5  # of four chosen answers the first has one token, and `empty` have none
    weights = torch.tensor([0.5, 1.0, 2.0, 1.25]) if weighted else torch.ones(4)
    tokens, _ = token_numbers(batch)
    chosen = tokens[: batch.own // 2]
    total = -sum(weight * values.sum() for weight, values in zip(weights.double(), chosen, strict=True))
    count = sum(weight * len(values) for weight, values in zip(weights.tolist(), chosen, strict=True))
    wanted = total / count
    hidden, labels, rows = laid_out(batch, way)
    arguments = {
        "bias": batch.bias, "loss_type": "sft", "memory_budget": BUDGETS[budget] * V * 8,
        "pair_weights": weights if weighted else None, **rows,
    }  # fmt: skip
    out = fastdpo.linear_loss(hidden, batch.weight, labels, **arguments)
    mean_length = count / weights.sum().item()
    part = fastdpo.linear_loss(
        hidden, batch.weight, labels, reduction="sum", mean_chosen_length=mean_length, **arguments
    )
    close(part.loss.detach(), weights.sum() * wanted.detach(), torch.float64)
    close(out.loss.detach(), wanted.detach(), torch.float64)
    for got, exact in zip(
        torch.autograd.grad(out.loss, batch.leaves), torch.autograd.grad(wanted, batch.leaves), strict=True
    ):
        close(got, exact, torch.float64)


@pytest.mark.parametrize("way, budget", [*TOGETHER, ("counted", "all"), ("shuffled", "tile")])
@pytest.mark.parametrize(
    "name, options",
    [
        ("sigmoid", {}),
        ("sigmoid", DIVERGENCES[0]),
        ("sigmoid", {"ld_alpha": 0.3, "use_weighting": True}),
        ("simpo", {}),
        ("cpo", {}),
        ("listwise", DIVERGENCES[1]),
        ("kto", {}),
    ],
)
def test_metrics(name, options, way, budget):
    """Against their definitions; `test_every_loss` compares both ways to go on every loss."""
    data = REGISTRY[name].data
    batch = batch_of(data, seed=9, others=data == "answers")
    hidden, labels, rows = laid_out(batch, way)
    refs = batch.refs if REGISTRY[name].needs_reference else None
    arguments = batch.arguments | rows | options
    out = fastdpo.linear_loss(
        hidden, batch.weight, labels, refs, bias=batch.bias, memory_budget=BUDGETS[budget] * V * 8, beta=BETA,
        loss_type=name, **arguments,
    )  # fmt: skip
    with torch.no_grad():
        tokens, _ = token_numbers(batch)
        sums = sums_of(tokens, options.get("ld_alpha"))
        rewards = BETA * (sums - (0 if refs is None else refs))
        if name == "simpo":
            rewards = rewards / torch.tensor([len(values) for values in tokens])
        if options.get("f_divergence_type") == "forward_kl":
            rewards = BETA * (1 - torch.exp(-(sums - refs)))
        if options.get("f_divergence_type") == "js_divergence":
            rewards = BETA * torch.log(2 / (1 + torch.exp(-(sums - refs))))
        logits = batch.hidden @ batch.weight.T + batch.bias
        p = logits.softmax(-1)
    if data == "pairs":
        chosen, rejected = range(batch.own // 2), range(batch.own // 2, batch.own)
    elif data == "lists":
        chosen = [group[0] for group in batch.groups]
        rejected = [sequence for sequence in range(batch.own) if sequence not in chosen]
    else:
        good = batch.arguments["desirable"].tolist()
        chosen = [i for i in range(batch.own) if good[i]]
        rejected = [i for i in range(batch.own) if not good[i]]

    def mean(values, sequences):
        return torch.tensor([values[s, t - 1].item() for s in sequences for t in batch.targets(s)]).mean().item()

    top = logits.argmax(-1)
    hits = [(top[s, t - 1] == batch.labels[s, t]).item() for s in chosen for t in batch.targets(s)]
    wanted = {
        "entropy": mean(-(p * p.log()).sum(-1), [*chosen, *rejected]),
        "logits/chosen": mean(logits.mean(-1), chosen),
        "logits/rejected": mean(logits.mean(-1), rejected),
        "mean_token_accuracy": sum(hits) / len(hits),
    }

    def sides(values):
        if data == "lists":  # the others of a list count as one
            others = torch.stack([values[list(group[1:])].mean() for group in batch.groups])
            return values[list(chosen)].mean().item(), others.mean().item()
        return values[list(chosen)].mean().item(), values[list(rejected)].mean().item()

    wanted["rewards/chosen"], wanted["rewards/rejected"] = sides(rewards)
    wanted["logps/chosen"], wanted["logps/rejected"] = sides(sums)
    wanted["rewards/margins"] = wanted["rewards/chosen"] - wanted["rewards/rejected"]
    found = {key: value.item() for key, value in out.metrics().items()}
    if data == "pairs":
        wanted["rewards/accuracies"] = (rewards[list(chosen)] > rewards[list(rejected)]).double().mean().item()
    extra = {"lists": {"rewards/accuracies"}, "answers": {"kl"}}.get(data, set())  # see test_lists, test_answers
    if out.extras is not None:
        count = sum(len(batch.targets(s)) for s in chosen)
        wanted["nll_loss"] = -sum(values.item() * 1.0 for values in sums[list(chosen)]) / count
        extra |= set(out.extras) - {"nll_loss"}  # ORPO's odds: see test_against_trl.py
    assert set(found) == set(wanted) | extra
    assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-6, abs=1e-9)


def test_metrics_without_those_of_tokens():
    batch = batch_of("pairs")
    outs = [
        fastdpo.linear_loss(
            batch.hidden, batch.weight, batch.labels, batch.refs, bias=batch.bias, memory_budget=rows * V * 8,
            token_metrics=False, use_weighting=True,
        )
        for rows in BUDGETS.values()
    ]  # fmt: skip
    for out in outs:
        assert out.tokens is None
        assert list(out.metrics()) == [
            "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
            "logps/rejected",
        ]  # fmt: skip
        close(out.losses, outs[0].losses, torch.float64)


class NoWaiting(TorchDispatchMode):
    """Copies from the host that a device would have to be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and not (kwargs or {}).get("non_blocking"):
            assert args[0].device == result.device, f"a blocking copy of {tuple(args[0].shape)} from the host"
        if function is torch.ops.aten.copy_.default and not (args[2:] or [False])[0]:
            assert args[0].device == args[1].device, f"a blocking copy of {tuple(args[1].shape)} from the host"
        return result


def _on_the_host(name, original):
    """torch.tensor and torch.as_tensor copy numbers to a GPU from memory that is not pinned, and wait for it."""

    def checked(data, **options):
        device = torch.device(options.get("device") or "cpu")
        assert isinstance(data, torch.Tensor) or device.type == "cpu", f"torch.{name}({data}, device=...) waits"
        return original(data, **options)

    return checked


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "names, options",
    [
        *(([name], REQUIRED.get(name, {})) for name in NAMES),
        (["sigmoid", "sft"], {"ld_alpha": 0.3, "use_weighting": True}),
        (["sigmoid"], {"f_divergence_type": "alpha_divergence"}),
        (["sigmoid"], {"mean_chosen_length": 3.5}),
        (["sigmoid", "sft"], {"pair_weights": True}),
        (["listwise"], {"pair_weights": True}),
        (["kto"], {"kl": 0.3}),
    ],
    ids=str,
)
def test_nothing_waits_for_the_device(names, options, budget, monkeypatch):
    """On the meta device, where there is nothing to be copied to the host: .item(), nonzero, a mask as an index raise.

    Packed rows with counts, as a trainer has them; loss, metrics, and backward.
    """
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a CUDA device
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, _on_the_host(name, getattr(torch, name)))
    data = REGISTRY[names[0]].data
    batch = batch_of(data, others=data == "answers")
    hidden, labels, rows = laid_out(batch, "counted")
    options = dict(options)
    if options.pop("pair_weights", False):
        options["pair_weights"] = torch.ones(len(batch.groups), device="meta")
    leaves = [tensor.detach().to("meta").requires_grad_() for tensor in (hidden, batch.weight, batch.bias)]
    moved = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value for key, value in batch.arguments.items()
    }
    rows["sequence_ids"] = rows["sequence_ids"].to("meta")
    labels, refs = labels.to("meta"), batch.refs.to("meta")
    with NoWaiting():
        out = fastdpo.linear_loss(
            leaves[0], leaves[1], labels, refs, bias=leaves[2], impl="eager", loss_type=names,
            memory_budget=BUDGETS[budget] * V * 8, **rows, **moved, **options,
        )  # fmt: skip
        out.metrics()
        out.loss.backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)


@pytest.mark.parametrize("what", ["item", "nonzero", "tolist", "mask"])
def test_the_meta_device_refuses_what_would_wait(what):
    values = torch.ones(3, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        {
            "item": lambda: values[0].item(),
            "nonzero": values.nonzero,
            "tolist": values.tolist,
            "mask": lambda: values[values > 0],
        }[what]()
