"""loss and linear_loss: padded, packed, and from hidden states are one function."""

import pytest
import torch
from drawing import pairwise
from loss_oracle import pair_losses
from oracle import linear_token_logprobs
from tiny import device_for

import fastdpo

B, T, V, D = 3, 9, 61, 8


def problem(seed=0, device="cpu"):
    """Hidden states, head, padded labels and references of three pairs of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * B, T, D, generator=generator).to(device).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(device).requires_grad_()
    labels = torch.full((2 * B, T), -100)
    for row, (start, end) in enumerate([(2, 5), (1, 9), (4, 6), (2, 9), (1, 3), (4, 8)]):
        labels[row, start:end] = torch.randint(V, (end - start,), generator=generator)
    refs = -10 - 5 * torch.rand(2 * B, generator=generator)
    return hidden, weight, labels.to(device), refs.to(device)


def truth(hidden, weight, labels, refs, name="sigmoid", beta=0.1, **options):
    logps = linear_token_logprobs(hidden[:, :-1].reshape(-1, D), weight, labels[:, 1:].reshape(-1))
    sums = logps.view(2 * B, T - 1).sum(1)
    lengths = (labels[:, 1:] != -100).sum(1).view(2, B)
    return pair_losses(name, *sums.view(2, B), *refs.view(2, B), beta, options.get("label_smoothing", 0.0), lengths)


def naively(hidden, weight, labels, refs, name, label_smoothing, beta=0.1):
    """`truth` in float32."""
    logps = torch.log_softmax(hidden[:, :-1] @ weight.T, -1)
    targets = labels[:, 1:]
    logps = logps.gather(2, targets.clamp(min=0).unsqueeze(2)).squeeze(2).masked_fill(targets == -100, 0.0)
    lengths = (targets != -100).sum(1).view(2, B)
    return pair_losses(name, *logps.sum(1).view(2, B), *refs.view(2, B), beta, label_smoothing, lengths)


def as_near(found, naive, exact):
    """The largest error is at most twice that of the naive code, and a little."""
    error, allowed = ((each.double() - exact.double()).abs().max() for each in (found, naive))
    assert error <= 2 * allowed + 2**-20 * exact.abs().max()


def packed(hidden, labels):
    """Rows with a target, pair by pair, with their sequence ids and counts."""
    rows, ids, targets, counts = [], [], [], []
    for pair in range(B):
        before = len(ids)
        for sequence in (pair, B + pair):
            for t in range(1, T):
                if labels[sequence, t] != -100:
                    rows.append(hidden[sequence, t - 1])
                    ids.append(sequence)
                    targets.append(labels[sequence, t])
        counts.append(len(ids) - before)
    return torch.stack(rows), torch.stack(targets), torch.tensor(ids, device=hidden.device), counts


@pytest.mark.parametrize("loss, way, impl", pairwise(
    [("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0), ("ipo", 0.0), ("aot", 0.0), ("aot_unpaired", 0.0)],
    ["loss padded", "loss packed", "linear padded", "linear packed", "linear shuffled", "chunks", "tiny tile"],
    ["eager", "triton"],
), ids=str)  # fmt: skip
def test_every_way_gives_the_same(loss, way, impl):
    name, options = loss[0], {"label_smoothing": loss[1]} if loss[1] else {}
    hidden, weight, labels, refs = problem(device=device_for(impl))
    exact = truth(hidden, weight, labels, refs, name, **options)
    options = {"loss_type": name, "impl": impl, **options}
    rows, targets, ids, counts = packed(hidden, labels)
    if way == "loss padded":
        out = fastdpo.loss(hidden @ weight.T, labels, refs, **options)
    elif way == "loss packed":
        out = fastdpo.loss(rows @ weight.T, targets, tuple(refs.view(2, B)), sequence_ids=ids, **options)
    elif way == "linear padded":
        out = fastdpo.linear_loss(hidden, weight, labels, refs, **options)
    elif way == "linear shuffled":
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1)).to(ids.device)
        out = fastdpo.linear_loss(rows[order], weight, targets[order], refs, sequence_ids=ids[order], **options)
    else:
        # Rows that the budget holds: all; a pair or two; less than any pair.
        budget = {"linear packed": 1 << 20, "chunks": max(counts) * V * 4, "tiny tile": 5 * V * 4}[way]
        out = fastdpo.linear_loss(
            rows, weight, targets, refs, sequence_ids=ids, tokens_per_pair=counts, memory_budget=budget, **options
        )
    naive = naively(hidden, weight, labels, refs, name, options.get("label_smoothing", 0.0))
    as_near(out.losses, naive, exact)
    as_near(out.loss, naive.mean(), exact.mean())
    grads = (torch.autograd.grad(3.0 * loss.mean(), [hidden, weight]) for loss in (out.loss, naive, exact))
    for found, plain, wanted in zip(*grads, strict=True):
        as_near(found, plain, wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_loss_reductions(reduction):
    hidden, weight, labels, refs = problem()
    out = fastdpo.linear_loss(hidden, weight, labels, refs, reduction=reduction)
    exact = truth(hidden, weight, labels, refs)
    weights = torch.tensor([1.0, -2.0, 0.5]) if reduction == "none" else torch.tensor(1.0)
    wanted = {"mean": exact.mean, "sum": exact.sum, "none": lambda: exact}[reduction]()
    got = torch.autograd.grad((out.loss * weights).sum(), [hidden, weight])
    for a, b in zip(got, torch.autograd.grad((wanted * weights).sum(), [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_frozen_head_gives_hidden_gradients_only():
    hidden, weight, labels, refs = problem()
    frozen = weight.detach()
    out = fastdpo.linear_loss(hidden, frozen, labels, refs)
    (got,) = torch.autograd.grad(out.loss, hidden)
    torch.testing.assert_close(got, torch.autograd.grad(truth(hidden, weight, labels, refs).mean(), hidden)[0])


def test_a_second_backward_raises_where_the_gradient_was_formed_in_the_forward():
    hidden, weight, labels, refs = problem()
    out = fastdpo.linear_loss(hidden, weight, labels, refs, memory_budget=3 * weight.shape[0] * 4)
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a backward has had it"):
        out.loss.backward()


def test_token_metrics():
    hidden, weight, labels, refs = problem()
    logits = (hidden @ weight.T).detach()
    metrics = fastdpo.loss(logits, labels, refs).metrics()
    other = fastdpo.linear_loss(hidden, weight, labels, refs).metrics()
    kept = labels[:, 1:] != -100
    p = torch.softmax(logits[:, :-1].double(), -1)
    entropy = -(p * p.log()).sum(-1)[kept].mean()
    hits = (logits[:B, :-1].argmax(-1) == labels[:B, 1:])[kept[:B]].double().mean()
    for found in (metrics, other):
        assert found["entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
        assert found["mean_token_accuracy"].item() == pytest.approx(hits.item())
        for side, rows in (("chosen", slice(0, B)), ("rejected", slice(B, 2 * B))):
            mean = logits[rows, :-1].mean(-1)[kept[rows]].mean().item()
            assert found[f"logits/{side}"].item() == pytest.approx(mean, rel=1e-4, abs=1e-5)
    assert "entropy" not in fastdpo.loss(logits, labels, refs, token_metrics=False).metrics()


def test_autocast_runs_the_head_in_bfloat16_and_returns_float32():
    hidden, weight, labels, refs = problem()
    with torch.autocast("cpu", torch.bfloat16):
        out = fastdpo.linear_loss(hidden, weight, labels, refs)
    assert out.loss.dtype == torch.float32 and out.chosen_logps.dtype == torch.float32
    exact = truth(hidden, weight, labels, refs)
    assert (out.losses.double() - exact).abs().max() < 0.1
    grads = torch.autograd.grad(out.loss, [hidden, weight])
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    wanted = torch.autograd.grad(exact.mean(), [hidden, weight])
    for a, b in zip(grads, wanted, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


PACKED = {"x": torch.zeros(7, D), "labels": torch.zeros(7, dtype=torch.long)}


@pytest.mark.parametrize("function", ["loss", "linear_loss"])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"ref_logps": None}, "ref_logps is missing"),
        ({"ref_logps": torch.zeros(5)}, r"ref_logps has shape \(5,\)"),
        ({"ref_logps": (torch.zeros(3), torch.zeros(2))}, "rejected part"),
        ({"labels": torch.zeros(2 * B, T - 1, dtype=torch.long)}, "labels has shape"),
        ({"x": torch.zeros(5, T, D)}, "it must have three dimensions"),
        ({"x": torch.zeros(0, T, D), "labels": torch.zeros(0, T, dtype=torch.long)}, "no pair"),
        ({"sequence_ids": torch.zeros(3, dtype=torch.long)}, "with sequence_ids it must be"),
        ({"sequence_ids": torch.full((7,), 2 * B), **PACKED}, r"sequence_ids lie in \[6, 6\]; 3 pairs need"),
        ({"sequence_ids": torch.full((7,), -1), **PACKED}, r"sequence_ids lie in \[-1, -1\]"),
        ({"sequence_ids": torch.zeros(7), **PACKED}, "sequence_ids is torch.float32"),
        ({"sequence_ids": torch.zeros(6, dtype=torch.long), **PACKED}, r"sequence_ids has shape \(6,\)"),
        ({"sequence_ids": torch.zeros(7, dtype=torch.long, device="meta"), **PACKED}, "sequence_ids is on meta"),
        ({"loss_type": "dpo"}, "no known loss"),
    ],
)
def test_bad_arguments(function, change, message):
    hidden, weight, labels, refs = problem()
    arguments = {"x": hidden.detach(), "labels": labels, "ref_logps": refs} | change
    x = arguments.pop("x")
    with pytest.raises(ValueError, match=message):
        if function == "loss":
            fastdpo.loss(x @ weight.detach().T, **arguments)
        else:
            fastdpo.linear_loss(x, weight.detach(), **arguments)
