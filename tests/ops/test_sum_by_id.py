"""Sums of log-probs by sequence are those of float64, rounded once, wherever a loss forms them."""

from types import SimpleNamespace

import pytest
import torch

import fastdpo
from fastdpo import models
from fastdpo.groups import length_desensitized
from fastdpo.ops import sum_by_id
from fastdpo.ops.sum_by_id import _sum_sorted

LENGTHS = [4096, 16384]


def numbers(count=5, n=2000, seed=0):
    """Values (n,) and ids (n,) in no order; nothing has the last id."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator), torch.randint(count - 1, (n,), generator=generator)


def plainly(values, ids, count):
    return torch.stack([values.double()[ids == i].sum() for i in range(count)])


@pytest.mark.parametrize("function", [sum_by_id, _sum_sorted])
def test_every_group_has_the_sum_of_its_values(function):
    values, ids = numbers()
    torch.testing.assert_close(function(values, ids, 5), plainly(values, ids, 5), rtol=1e-12, atol=1e-12)
    assert torch.equal(function(values[:0], ids[:0], 3), torch.zeros(3, dtype=torch.float64))
    values[ids == 2] = torch.nan
    values[ids == 1] = -torch.inf
    sums = function(values, ids, 5)
    assert sums[1] == -torch.inf and sums[2].isnan() and sums[[0, 3, 4]].isfinite().all()


def test_is_a_well_made_operator_with_a_gradient():
    values, ids = numbers(n=20)
    torch.library.opcheck(torch.ops.fastdpo.sum_by_id, (values.requires_grad_(), ids, 5))
    (grad,) = torch.autograd.grad(sum_by_id(values, ids, 5), values, torch.arange(5.0, dtype=torch.float64))
    assert grad.dtype == torch.float32 and torch.equal(grad, ids.float())
    torch.autograd.gradgradcheck(lambda x: sum_by_id(x, ids, 5).square(), values.detach().double().requires_grad_())


@pytest.mark.gpu
def test_on_a_gpu_the_same_every_time_without_a_wait():
    values, ids = numbers(count=7, n=100_000)
    expected = plainly(values, ids, 7)
    values, ids = values.cuda(), ids.cuda()
    sum_by_id(values, ids, 7)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums = [sum_by_id(values, ids, 7) for _ in range(5)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(sums[0].cpu(), expected, rtol=1e-12, atol=1e-9)
    assert all(torch.equal(each, sums[0]) for each in sums)


class Long:
    """Two answers of n and of n - 100 tokens of some -8 nats each: hidden (N, 1), head (2, 1), so that the logits of a
    token are 0 and its hidden state, whatever multiplies them."""

    def __init__(self, n, device="cpu"):
        generator = torch.Generator().manual_seed(n)
        self.counts = [n, n - 100]
        self.hidden = (7.5 + torch.rand(sum(self.counts), 1, generator=generator)).to(device)
        self.weight = torch.tensor([[0.0], [1.0]], device=device)
        self.labels = torch.zeros(sum(self.counts), dtype=torch.long, device=device)
        self.ids = torch.arange(2, device=device).repeat_interleave(torch.tensor(self.counts, device=device))
        self.logits = self.hidden @ self.weight.T
        self.logps = fastdpo.token_logps(self.logits, self.labels).double()

    def sums(self, ld_alpha=1.0):
        chosen, rejected = self.logps.split(self.counts)
        shared = self.counts[1]
        return torch.stack([chosen[:shared].sum() + ld_alpha * chosen[shared:].sum(), rejected.sum()])

    def outputs(self, refs, **options):
        """From logits, packed and padded, and from hidden states by every way there is."""
        n = self.counts[0]
        labels = torch.full((2, n + 1), -100)
        labels[0, 1:], labels[1, 1 : self.counts[1] + 1] = 0, 0
        rows = [self.logits[: self.counts[0]], self.logits[self.counts[0] :]]
        logits = torch.stack([torch.nn.functional.pad(each, (0, 0, 0, n + 1 - len(each))) for each in rows])
        yield fastdpo.loss(self.logits, self.labels, refs, sequence_ids=self.ids, **options)
        yield fastdpo.loss(logits, labels, refs, **options)
        for trained in (self.weight.requires_grad_(), self.weight.detach()):
            for budget in (40_000, 10**9):  # bytes: tiles of logits, or all of them
                yield fastdpo.linear_loss(
                    self.hidden, trained, self.labels, refs, sequence_ids=self.ids, memory_budget=budget, **options
                )


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_the_sums_of_pairs_are_rounded_once(n, ld_alpha):
    long = Long(n)
    exact = long.sums(1.0 if ld_alpha is None else ld_alpha).float()
    for output in long.outputs(exact, ld_alpha=ld_alpha):
        assert torch.equal(torch.cat([output.chosen_logps, output.rejected_logps]), exact)
        assert torch.equal(output.chosen_rewards, torch.zeros(1))  # the reference has the same sums


def test_the_weights_of_wpo():
    long = Long(LENGTHS[1])
    p = long.logits.double().softmax(1).square().sum(1).log()
    aligned = [each.mean() for each in (long.logps - p).split(long.counts)]
    sums = long.sums().float()
    refs = sums - torch.tensor([8.0, 4.0])  # exact: margins of 4
    expected = (aligned[0] + aligned[1]).exp() * -torch.nn.functional.logsigmoid(torch.tensor(0.4).double())
    for output in long.outputs(refs, use_weighting=True):
        torch.testing.assert_close(output.losses[0].double(), expected, rtol=1e-6, atol=0)


def test_the_sums_of_lists_and_of_single_answers():
    long = Long(LENGTHS[1])
    exact = long.sums()
    for output in long.outputs(torch.zeros(2), loss_type="listwise", list_sizes=2):
        assert torch.equal(torch.cat([output.chosen_logps, output.rejected_logps]), exact.float())
    refs = torch.tensor([0.0, float(exact[1].float()) - 1.5])
    for output in long.outputs(refs, loss_type="kto", desirable=torch.tensor([True])):
        assert torch.equal(output.chosen_logps, exact[:1].float())
        assert torch.equal(output.kl, (exact[1] - refs[1].double()).float())  # of the second, an answer elsewhere


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
def test_the_sums_of_a_reference(ld_alpha, monkeypatch):
    long = Long(LENGTHS[1])
    monkeypatch.setattr(models, "target_logps", lambda *_, **__: long.logps.float())
    batch = SimpleNamespace(sequence_ids=long.ids, num_sequences=2)
    sums = models._sequence_logps(None, batch, attention_backend="auto", ld_alpha=ld_alpha)
    exact = long.sums(1.0 if ld_alpha is None else ld_alpha)
    assert sums.dtype == torch.float32 and torch.equal(sums, exact.float())
    if ld_alpha is not None:
        assert torch.equal(length_desensitized(long.logps.float(), long.ids, 2, ld_alpha), sums)
