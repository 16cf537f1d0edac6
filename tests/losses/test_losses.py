"""Every registered loss against its formula in float64, and what the registry refuses."""

import pytest
import torch
from oracle import pair_losses

import fastdpo
from fastdpo.losses import REGISTRY, resolve_losses


def draw(pairs=9, scale=5.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logps = [(-20 + scale * torch.randn(pairs, generator=generator)).requires_grad_() for _ in range(4)]
    lengths = torch.randint(1, 30, (2, pairs), generator=generator).float()
    return logps, lengths


def call(name, logps, lengths, **options):
    extra = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]} if REGISTRY[name].needs_lengths else {}
    return fastdpo.preference_loss(*logps, loss_type=name, **extra, **options)


@pytest.mark.parametrize(
    "name, label_smoothing",
    [*((n, 0.0) for n in REGISTRY), ("sigmoid", 0.1), ("sigmoid", 0.5), ("aot", 0.1), ("aot_unpaired", 0.3)],
)
@pytest.mark.parametrize("beta", [0.05, 0.7])
def test_values_and_gradients(name, label_smoothing, beta):
    logps, lengths = draw()
    out = call(name, logps, lengths, beta=beta, label_smoothing=label_smoothing)
    truth = pair_losses(name, *logps, beta, label_smoothing, lengths)
    torch.testing.assert_close(out.losses.double(), truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.loss, out.losses.mean())
    got = torch.autograd.grad(out.loss, logps[:2])
    exact = torch.autograd.grad(truth.mean(), logps[:2])
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.chosen_rewards, beta * (logps[0] - logps[2]).detach())
    torch.testing.assert_close(out.rejected_rewards, beta * (logps[1] - logps[3]).detach())
    assert not out.chosen_rewards.requires_grad and not out.chosen_logps.requires_grad


@pytest.mark.parametrize("name", REGISTRY)
def test_extreme_margins_stay_finite(name):
    logps = [torch.tensor([1e4, -1e4], requires_grad=True), torch.zeros(2, requires_grad=True)]
    lengths = torch.ones(2, 2)
    out = call(name, [*logps, torch.zeros(2), torch.zeros(2)], lengths, beta=1.0)
    out.loss.backward()
    assert out.losses.isfinite().all() and all(tensor.grad.isfinite().all() for tensor in logps)


@pytest.mark.parametrize("name", ["sigmoid", "hinge"])
def test_a_constant_on_both_references_changes_nothing(name):
    logps, lengths = draw()
    shifted = [*logps[:2], logps[2] + 3.0, logps[3] + 3.0]
    torch.testing.assert_close(call(name, logps, lengths).losses, call(name, shifted, lengths).losses)


def test_mixed_losses_are_the_weighted_sum():
    logps, lengths = draw()
    mixed = fastdpo.preference_loss(
        *logps,
        loss_type=["sigmoid", "ipo"],
        loss_weights=[0.25, 2.0],
        chosen_lengths=lengths[0],
        rejected_lengths=lengths[1],
    )
    parts = [call(name, logps, lengths).losses for name in ("sigmoid", "ipo")]
    torch.testing.assert_close(mixed.losses, 0.25 * parts[0] + 2.0 * parts[1])


def test_reductions():
    logps, lengths = draw()
    outs = {r: call("sigmoid", logps, lengths, reduction=r) for r in ("mean", "sum", "none")}
    torch.testing.assert_close(outs["sum"].loss, 9 * outs["mean"].loss)
    torch.testing.assert_close(outs["none"].loss, outs["mean"].losses)


def test_metrics():
    logps = [
        torch.tensor([-1.0, -2.0]),
        torch.tensor([-3.0, -1.5]),
        torch.tensor([-2.0, -2.0]),
        torch.tensor([-2.0, -2.0]),
    ]
    metrics = fastdpo.preference_loss(*logps, beta=0.5).metrics()
    assert {name: round(value.item(), 6) for name, value in metrics.items()} == {
        "rewards/chosen": 0.25,
        "rewards/rejected": -0.125,
        "rewards/accuracies": 0.5,
        "rewards/margins": 0.375,
        "logps/chosen": -1.5,
        "logps/rejected": -2.25,
    }


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"loss_type": "sigmod"}, "Did you mean 'sigmoid'"),
        ({"loss_type": []}, "at least one loss"),
        ({"loss_type": ["sigmoid", "hinge"], "loss_weights": [1.0]}, "loss_weights has 1 values"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 has no meaning for loss_type hinge"),
        ({"label_smoothing": 0.7}, r"must lie in \[0, 0.5\]"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"gamma": 1.0}, "gamma is no option"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        resolve_losses(**({"loss_type": "sigmoid"} | arguments))
    with pytest.raises(ValueError, match=message):
        fastdpo.preference_loss(*draw()[0], **arguments)


def test_bad_tensors():
    logps = [tensor.detach() for tensor in draw()[0]]
    with pytest.raises(ValueError, match="needs the reference"):
        fastdpo.preference_loss(*logps[:2])
    with pytest.raises(ValueError, match="ref_rejected_logps is missing"):
        fastdpo.preference_loss(*logps[:3])
    with pytest.raises(ValueError, match="rejected_logps has shape"):
        fastdpo.preference_loss(logps[0], logps[1][:3], *logps[2:])
    with pytest.raises(ValueError, match="chosen_lengths"):
        fastdpo.preference_loss(*logps, loss_type="ipo")
    with pytest.raises(ValueError, match="reduction is 'avg'"):
        fastdpo.preference_loss(*logps, reduction="avg")
    with pytest.raises(ValueError, match="no pair"):
        fastdpo.preference_loss(*(tensor[:0] for tensor in logps))
