"""A loss of the user's own: works wherever a built-in one does; refused where step 1,000 would have failed."""

import pytest
import torch
import torch.nn.functional as F

import fastdpo
from fastdpo.losses import REGISTRY, AnswerTerms, ListTerms, PairTerms

V, D = 23, 6


@pytest.fixture(autouse=True)
def registry():
    """As it was, whatever a test registers."""
    before = dict(REGISTRY)
    yield REGISTRY
    REGISTRY.clear()
    REGISTRY.update(before)


def squared(terms, *, beta, target=1.0):
    return (target - beta * terms.delta) ** 2


def logps_of(count=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(4, count, generator=generator, dtype=torch.float64) * 3 - 15
    return [values[0].requires_grad_(), values[1].detach().requires_grad_(), values[2], values[3]]


def tokens(lengths, seed=0):
    """Packed rows of sequences of these lengths, group by group; gradients in float64."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([i for i, length in lengths for _ in range(length)])
    hidden = torch.randn(len(ids), D, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(V, (len(ids),), generator=generator)
    refs = -3 * torch.tensor([float(length) for _, length in sorted(lengths)], dtype=torch.float64)
    return hidden, weight, labels, ids, refs


def sums_of(hidden, weight, labels, ids, count):
    logps = torch.log_softmax(hidden @ weight.T, 1).gather(1, labels[:, None]).squeeze(1)
    return torch.zeros(count, dtype=torch.float64).index_add(0, ids, logps)


def is_fused_for(monkeypatch):
    """A list that grows by one whenever the fused path runs."""
    from fastdpo import functional

    calls, original = [], functional.fused_group_loss
    monkeypatch.setattr(functional, "fused_group_loss", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def agree(lengths, count, truth, monkeypatch, fused=True, **options):
    """loss and linear_loss, on a budget of a few rows, equal `truth` of the sums, with their gradients."""
    hidden, weight, labels, ids, refs = tokens(lengths)
    expected = truth(sums_of(hidden, weight, labels, ids, count), refs).mean()
    exact = torch.autograd.grad(expected, [hidden, weight])
    calls = is_fused_for(monkeypatch)
    outs = [fastdpo.loss(hidden @ weight.T, labels, refs, sequence_ids=ids, **options)]
    for budget in (4 * V * 8, 1, None):
        outs.append(
            fastdpo.linear_loss(hidden, weight, labels, refs, sequence_ids=ids, memory_budget=budget, **options)
        )
    assert len(calls) == (2 if fused else 0)
    for out in outs:
        torch.testing.assert_close(out.loss, expected, rtol=1e-10, atol=1e-11)
        for mine, grad in zip(torch.autograd.grad(out.loss, [hidden, weight]), exact, strict=True):
            torch.testing.assert_close(mine, grad, rtol=1e-9, atol=1e-10)


PAIR_LENGTHS = [(0, 3), (4, 5), (1, 1), (5, 2), (2, 6), (6, 4), (3, 7), (7, 1)]


# Where it works


def test_as_a_function_and_as_a_decorator():
    assert fastdpo.register_loss("own_squared", squared, options={"target": 1.0}) is squared

    @fastdpo.register_loss("own_decorated", formula="(1 - βδ)²", source="nobody", pieces=["f_divergence_type"])
    def decorated(terms, *, beta):
        return (1 - beta * terms.delta) ** 2

    assert callable(decorated) and REGISTRY["own_decorated"].fn is decorated
    assert REGISTRY["own_decorated"].formula == "(1 - βδ)²" and REGISTRY["own_decorated"].source == "nobody"
    logps = logps_of()
    one, other = (fastdpo.preference_loss(*logps, loss_type=name) for name in ("own_squared", "own_decorated"))
    torch.testing.assert_close(one.losses, other.losses, rtol=0, atol=0)


def test_in_preference_loss_with_its_options():
    fastdpo.register_loss("own_squared", squared, options={"target": 1.0})
    chosen, rejected, ref_chosen, ref_rejected = logps = logps_of()
    delta = (chosen - ref_chosen) - (rejected - ref_rejected)
    out = fastdpo.preference_loss(*logps, loss_type="own_squared", beta=0.3)
    torch.testing.assert_close(out.losses, (1 - 0.3 * delta) ** 2)
    out = fastdpo.preference_loss(*logps, loss_type="own_squared", beta=0.3, target=2.5)
    torch.testing.assert_close(out.losses, (2.5 - 0.3 * delta) ** 2)
    mixed = fastdpo.preference_loss(*logps, loss_type=["own_squared", "hinge"], loss_weights=[2.0, 1.0], target=2.5)
    plain = [fastdpo.preference_loss(*logps, loss_type="own_squared", target=2.5).losses,
             fastdpo.preference_loss(*logps, loss_type="hinge").losses]  # fmt: skip
    torch.testing.assert_close(mixed.losses, 2 * plain[0] + plain[1])
    with pytest.raises(ValueError, match=r"goal is no option of a loss; known are: .*target"):
        fastdpo.preference_loss(*logps, loss_type="own_squared", goal=2.5)
    with pytest.raises(ValueError, match=r"target=2\.5 has no meaning for loss_type hinge; .*own_squared"):
        fastdpo.preference_loss(*logps, loss_type="hinge", target=2.5)
    with pytest.raises(ValueError, match=r"label_smoothing=0\.1 has no meaning for loss_type own_squared"):
        fastdpo.preference_loss(*logps, loss_type="own_squared", label_smoothing=0.1)


def test_an_option_of_other_losses_keeps_its_default():
    """The functions and configs name it in their signatures, and pass that."""

    def smooth(terms, *, beta, label_smoothing):
        return -F.logsigmoid(beta * terms.delta) - label_smoothing * F.logsigmoid(-beta * terms.delta)

    with pytest.raises(ValueError, match=r"'label_smoothing' has the default 0.0 in other losses and 0.2 here"):
        fastdpo.register_loss("own_smooth", smooth, options={"label_smoothing": 0.2})
    fastdpo.register_loss("own_smooth", smooth, options={"label_smoothing": 0.0})
    logps = logps_of()
    truth = smooth(PairTerms(*logps), beta=0.1, label_smoothing=0.2)
    out = fastdpo.preference_loss(*logps, loss_type="own_smooth", label_smoothing=0.2)
    torch.testing.assert_close(out.losses, truth)


@pytest.mark.parametrize(
    "pieces, options",
    [
        (("f_divergence_type", "f_alpha_divergence_coef"), {"f_divergence_type": "forward_kl"}),
        (
            ("f_divergence_type", "f_alpha_divergence_coef"),
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2},
        ),
        (("reference_free",), {"reference_free": True}),
    ],
)
def test_pieces_that_it_honours(pieces, options):
    def logistic(terms, *, beta):
        return -F.logsigmoid(beta * terms.delta)

    fastdpo.register_loss("own_without", logistic)
    fastdpo.register_loss("own_with", logistic, pieces=pieces)
    logps = logps_of()
    given = logps[:2] if "reference_free" in options else logps
    out = fastdpo.preference_loss(*given, loss_type="own_with", **options)
    torch.testing.assert_close(out.losses, fastdpo.preference_loss(*given, **options).losses)
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* has no meaning for loss_type own_without"):
        fastdpo.preference_loss(*given, loss_type="own_without", **options)


def test_the_divergence_of_a_mix_is_not_that_of_what_does_not_honour_it():
    plain = fastdpo.register_loss("own_plain", lambda terms, *, beta: beta * terms.delta, needs_reference=False)
    logps = logps_of()
    out = fastdpo.preference_loss(*logps, loss_type=["sigmoid", "own_plain"], f_divergence_type="js_divergence")
    alone = fastdpo.preference_loss(*logps, f_divergence_type="js_divergence").losses
    torch.testing.assert_close(out.losses, alone + plain(PairTerms(*logps), beta=0.1))


@pytest.mark.parametrize("shuffled", [False, True])
def test_of_pairs_from_tokens(monkeypatch, shuffled):
    fastdpo.register_loss("own_squared", squared, options={"target": 1.0})
    lengths = PAIR_LENGTHS if not shuffled else [PAIR_LENGTHS[i] for i in (5, 2, 0, 7, 4, 1, 6, 3)]

    def truth(sums, refs):
        chosen, rejected = (sums - refs).view(2, 4)
        return (2.5 - 0.3 * (chosen - rejected)) ** 2

    agree(lengths, 8, truth, monkeypatch, loss_type="own_squared", beta=0.3, target=2.5)


def test_of_pairs_with_lengths_from_tokens(monkeypatch):
    """Lengths and the batch's mean length come out of the labels, whatever chunk a pair is in."""

    @fastdpo.register_loss("own_lengths", needs_lengths=True)
    def with_lengths(terms, *, beta):
        means = terms.chosen_mean_logps - terms.rejected_mean_logps
        return terms.chosen_nll - F.logsigmoid(beta * means)

    counts = torch.tensor([float(n) for _, n in sorted(PAIR_LENGTHS)], dtype=torch.float64).view(2, 4)

    def truth(sums, refs):
        chosen, rejected = sums.view(2, 4)
        return -chosen / counts[0].mean() - F.logsigmoid(0.3 * (chosen / counts[0] - rejected / counts[1]))

    agree(PAIR_LENGTHS, 8, truth, monkeypatch, loss_type="own_lengths", beta=0.3)


def test_of_a_whole_batch_from_tokens(monkeypatch):
    """Not formed chunk by chunk."""

    @fastdpo.register_loss("own_batch", per_pair=False)
    def batch(terms, *, beta):
        return (beta * (terms.delta - terms.delta.mean())) ** 2

    def truth(sums, refs):
        chosen, rejected = (sums - refs).view(2, 4)
        delta = chosen - rejected
        return (0.3 * (delta - delta.mean())) ** 2

    agree(PAIR_LENGTHS, 8, truth, monkeypatch, fused=False, loss_type="own_batch", beta=0.3)
    with pytest.raises(ValueError, match="pair_weights has no meaning for loss_type own_batch"):
        fastdpo.preference_loss(*logps_of(), loss_type="own_batch", pair_weights=torch.ones(5))


def test_of_lists(monkeypatch):
    @fastdpo.register_loss("own_lists", data="lists", options={"power": 2})
    def lists(terms, *, beta, power=2):
        assert isinstance(terms, ListTerms)
        ratios = torch.where(terms.valid, terms.logratios, 0.0)
        return ((beta * (ratios[:, 0] - ratios.sum(1) / terms.valid.sum(1))) ** power).abs()

    def truth(sums, refs):
        parts = (sums - refs).split([3, 2])
        return torch.stack([(0.3 * (part[0] - part.mean())).abs() ** 3 for part in parts])

    options = {"loss_type": "own_lists", "beta": 0.3, "power": 3, "list_sizes": [3, 2]}
    agree([(0, 3), (1, 1), (2, 4), (3, 5), (4, 2)], 5, truth, monkeypatch, **options)
    logps = logps_of()
    out = fastdpo.listwise_loss(logps[0], logps[2], **options)
    torch.testing.assert_close(out.losses, truth(logps[0], logps[2]))
    with pytest.raises(ValueError, match=r"own_lists is a loss of lists, not of pairs; call fastdpo\.listwise_loss"):
        fastdpo.preference_loss(*logps, loss_type="own_lists")


def test_of_answers(monkeypatch):
    @fastdpo.register_loss("own_answers", data="answers", needs_kl=True, options={"scale": 1.0})
    def answers(terms, *, beta, scale=1.0):
        assert isinstance(terms, AnswerTerms)
        signs = torch.where(terms.desirable, -1.0, 1.0).to(terms.logps.dtype)
        return scale * F.softplus(signs * beta * (terms.logratios - terms.kl))

    desirable = torch.tensor([True, False, True, True])

    def truth(sums, refs):
        signs = torch.where(desirable, -1.0, 1.0).double()
        return 2 * torch.log1p(torch.exp(signs * 0.3 * (sums - refs - 0.5)))

    options = {"loss_type": "own_answers", "beta": 0.3, "scale": 2.0, "kl": 0.5, "desirable": desirable}
    agree([(0, 3), (1, 1), (2, 4), (3, 5)], 4, truth, monkeypatch, **options)
    logps = logps_of(4)
    torch.testing.assert_close(fastdpo.unpaired_loss(logps[0], logps[2], **options).losses, truth(logps[0], logps[2]))
    del options["kl"]
    with pytest.raises(ValueError, match="kl is missing, and loss_type own_answers needs it"):
        fastdpo.unpaired_loss(logps[0], logps[2], **options)


def test_of_scores():
    @fastdpo.register_loss("own_scores", data="scores", needs_reference=False)
    def scores(terms, *, beta):
        margin = 0 if terms.margins is None else terms.margins
        return F.relu(1 + margin - (terms.chosen_logps - terms.rejected_logps))

    chosen, rejected, *_ = logps_of()
    margins = torch.arange(5.0)
    out = fastdpo.preference_loss(chosen, rejected, loss_type="own_scores", margins=margins)
    torch.testing.assert_close(out.losses, F.relu(1 + margins.double() - chosen + rejected))
    torch.testing.assert_close(out.chosen_rewards, chosen.detach())


def test_weights_and_references_are_as_of_others():
    fastdpo.register_loss("own_squared", squared, options={"target": 1.0})
    fastdpo.register_loss("own_free", lambda terms, *, beta: -beta * terms.chosen_logps, needs_reference=False)
    logps, weights = logps_of(), torch.tensor([1.0, 0.0, 2.0, 0.5, 1.5])
    out = fastdpo.preference_loss(*logps, loss_type="own_squared", pair_weights=weights)
    plain = fastdpo.preference_loss(*logps, loss_type="own_squared")
    torch.testing.assert_close(out.loss, (weights * plain.losses).sum() / 5)
    torch.testing.assert_close(
        fastdpo.preference_loss(*logps[:2], loss_type="own_free", beta=0.2).losses, -0.2 * logps[0]
    )
    with pytest.raises(ValueError, match="ref_logps is missing, and loss_type own_squared needs the reference"):
        fastdpo.preference_loss(*logps[:2], loss_type="own_squared")


def test_again_and_overwriting():
    fastdpo.register_loss("own_squared", squared)
    for name in ("own_squared", "sigmoid"):
        with pytest.raises(ValueError, match=f"a loss '{name}' is registered already; .*overwrite=True"):
            fastdpo.register_loss(name, squared)
    other = fastdpo.register_loss("own_squared", lambda terms, *, beta: beta * terms.delta**2, overwrite=True)
    assert REGISTRY["own_squared"].fn is other

    @fastdpo.register_loss("own_squared", overwrite=True)
    def third(terms, *, beta):
        return terms.delta**2

    assert REGISTRY["own_squared"].fn is third


# What is refused


def test_a_refusal_leaves_the_registry_as_it_was():
    before = dict(REGISTRY)
    for overwrite, name in ((False, "own_bad"), (True, "sigmoid")):
        with pytest.raises(ValueError, match="cannot be registered"):
            fastdpo.register_loss(name, lambda terms, *, beta: terms.delta.mean(), overwrite=overwrite)
    assert before == REGISTRY


def raising(terms, *, beta):
    raise RuntimeError("out of luck")


def raising_alone(terms, *, beta):
    """Takes it for granted that there are two pairs."""
    return terms.delta * 1.0 + 0 * terms.delta[1]


def nan_gradient(terms, *, beta):
    return terms.delta.abs() + torch.sqrt((terms.delta - terms.delta.detach()).clamp(min=0))


WEIGHT = torch.nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    "fn, message",
    [
        (lambda terms, *, beta: terms.delta.mean(), r"it gives \(\) for a batch of 5; it must give \(5,\)"),
        (lambda terms, *, beta: terms.delta[:, None], r"it gives \(5, 1\) for a batch of 5"),
        (lambda terms, *, beta: terms.delta[1:], r"it gives \(4,\) for a batch of 5"),
        (lambda terms, *, beta: None, "it gives NoneType for a batch of 5"),
        (lambda terms, *, beta: terms.delta.tolist(), "it gives list for a batch of 5"),
        (lambda terms, *, beta: torch.log(-terms.chosen_logps - 100), "on ordinary log-probs it gives .*nan"),
        (lambda terms, *, beta: terms.delta / 0, "on ordinary log-probs it gives .*inf"),
        (lambda terms, *, beta: terms.delta.detach(), "no gradient reaches the log-probs; .*without detach"),
        (lambda terms, *, beta: (terms.delta > 0).float(), "no gradient reaches the log-probs"),
        (lambda terms, *, beta: WEIGHT * terms.delta.detach(), "no gradient reaches the log-probs"),
        (lambda terms, *, beta: terms.delta - terms.delta.mean(), "depends on the others .*per_pair=False"),
        (lambda terms, *, beta: terms.delta.sort().values, "depends on the others .*per_pair=False"),
        (lambda terms, *, beta: terms.delta / terms.delta.std(correction=0), "depends on the others .*per_pair=False"),
        (nan_gradient, "its gradient at log-probs .* it must be finite"),
        (raising, "on a drawn batch it raises RuntimeError: out of luck"),
        (raising_alone, "IndexError"),
        (lambda terms, *, beta: (beta * terms.delta).squeeze(), r"\(\)"),
        (lambda terms: terms.delta, "on a drawn batch it raises TypeError: .*beta"),
        (lambda terms, *, beta: terms.logratios, "on a drawn batch it raises AttributeError: .*logratios"),
        (lambda terms, *, beta: terms.chosen_mean_logps, "on a drawn batch it raises AssertionError: .*needs_lengths"),
        (lambda terms, *, beta: terms.chosen_nll, "on a drawn batch it raises AssertionError: .*needs_lengths"),
    ],
)  # fmt: skip
def test_functions_that_are_refused(fn, message):
    with pytest.raises(ValueError, match=f"the loss 'own_bad' cannot be registered: .*{message}"):
        fastdpo.register_loss("own_bad", fn)
    assert "own_bad" not in REGISTRY


@pytest.mark.parametrize("data", ["lists", "answers", "scores"])
@pytest.mark.parametrize(
    "of, message",
    [
        (lambda logps: logps.mean(), r"it gives \(\) for a batch of 5"),
        (lambda logps: logps.reshape(len(logps), -1).sum(1).detach(), "no gradient reaches the log-probs"),
        (lambda logps: logps.reshape(len(logps), -1).sum(1) - logps.mean(), "per_pair=False"),
        (lambda logps: logps.reshape(len(logps), -1).sum(1) * torch.nan, "it gives .*nan"),
    ],
)
def test_functions_of_other_data_that_are_refused(data, of, message):
    def fn(terms, *, beta):
        return of(terms.chosen_logps if data == "scores" else terms.logps)

    with pytest.raises(ValueError, match=message):
        fastdpo.register_loss("own_bad", fn, data=data)
    assert "own_bad" not in REGISTRY


def test_a_loss_of_the_batch_may_depend_on_the_batch():
    fn = fastdpo.register_loss("own_sort", lambda terms, *, beta: terms.delta.sort().values, per_pair=False)
    assert REGISTRY["own_sort"].fn is fn and not REGISTRY["own_sort"].per_pair


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "not a word"}, "the name of a loss is 'not a word'; it must be a word of letters"),
        ({"name": "lambda"}, "the name of a loss is 'lambda'"),
        ({"name": ""}, "the name of a loss is ''"),
        ({"name": 3}, "the name of a loss is 3"),
        ({"data": "triples"}, "data is 'triples'; it must be one of 'pairs', 'lists', 'answers', 'scores'"),
        ({"pieces": ["f_divergence"]}, "pieces has 'f_divergence'; known are: f_divergence_type, "),
        ({"options": {"ld_alpha": 0.5}}, "the option 'ld_alpha' of loss 'own_bad' has a meaning already"),
        ({"options": {"beta": 0.5}}, "the option 'beta' of loss 'own_bad' has a meaning already"),
        ({"options": {"unknown": 0.5}}, "on a drawn batch it raises TypeError: .*unknown"),
        # Names of arguments never arrive as options.
        ({"options": {"reduction": 0.5}}, "the option 'reduction' of loss 'own_bad' has a meaning already"),
        ({"options": {"temperature": 0.5}}, "the option 'temperature' of loss 'own_bad' has a meaning already"),
        ({"options": {"pair_weights": 0.5}}, "the option 'pair_weights' of loss 'own_bad' has a meaning already"),
        # Pieces and needs that data of the kind do not have.
        ({"data": "lists", "pieces": ["ld_alpha"]}, "ld_alpha"),
        ({"data": "answers", "pieces": ["use_weighting"]}, "use_weighting"),
        ({"needs_kl": True}, "needs_kl"),
    ],
)
def test_declarations_that_are_refused(arguments, message):
    arguments = {"name": "own_bad"} | arguments

    def of_pairs(terms, *, beta, reduction=0, temperature=0, pair_weights=0):
        return beta * terms.delta

    def of_others(terms, *, beta):
        return beta * terms.logratios.reshape(len(terms.logps), -1).sum(1)

    with pytest.raises(ValueError, match=message):
        fastdpo.register_loss(fn=of_pairs if arguments.get("data", "triples") == "triples" else of_others, **arguments)
    assert arguments["name"] not in REGISTRY
