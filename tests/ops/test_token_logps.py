"""token_logps: what the autograd layer adds to the kernels."""

import pytest
import torch
from oracle import token_logprobs
from tiny import device_for

import fastdpo

IMPLS = ["eager", "triton"]


def naive(logits, labels):
    return torch.log_softmax(logits.double(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("view", ["1d", "2d", "3d", "shifted", "strided", "transposed"])
def test_shapes_and_strides(impl, view):
    torch.manual_seed(0)
    device = device_for(impl)
    base = torch.randn(4, 7, 50, device=device)
    logits = {
        "1d": base[0, 0],
        "2d": base[0],
        "3d": base,
        "shifted": base[:, :-1],
        "strided": torch.randn(4, 7, 64, device=device)[:, ::2, :50],
        "transposed": torch.randn(4, 50, 7, device=device).transpose(1, 2),
    }[view].detach().requires_grad_()  # fmt: skip
    labels = torch.randint(50, logits.shape[:-1], device=device)
    ours = fastdpo.token_logps(logits, labels, impl=impl)
    assert ours.shape == labels.shape and ours.dtype == torch.float32
    truth = naive(logits, labels)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    weights = torch.randn(labels.shape, device=device)
    (got,) = torch.autograd.grad((ours * weights).sum(), logits)
    (exact,) = torch.autograd.grad((truth * weights).sum(), logits)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_backward_equals_the_other_and_a_second_one_raises(impl):
    torch.manual_seed(0)
    x = torch.randn(6, 40, device=device_for(impl), requires_grad=True)
    labels = torch.randint(40, (6,), device=x.device)
    grads = []
    for inplace in (False, True):
        logits = x * 1.0
        out = fastdpo.token_logps(logits, labels, inplace_backward=inplace, impl=impl)
        grads.append(torch.autograd.grad(out.sum(), x, retain_graph=True)[0])
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(out.sum(), x)
        else:
            torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], grads[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_double_use_of_the_same_logits(impl):
    x = torch.randn(5, 30, device=device_for(impl), requires_grad=True)
    labels = torch.randint(30, (5,), device=x.device)
    logits = x * 2
    both = fastdpo.token_logps(logits, labels, impl=impl).sum() + logits.logsumexp(-1).sum()
    truth = naive(x * 2, labels).sum() + (x * 2).double().logsumexp(-1).sum()
    torch.testing.assert_close(torch.autograd.grad(both, x)[0], torch.autograd.grad(truth, x)[0])


def test_checkpointing_and_no_grad():
    x = torch.randn(5, 30, requires_grad=True)
    labels = torch.randint(30, (5,))
    plain = torch.autograd.grad(fastdpo.token_logps(x, labels).sum(), x)[0]
    out = torch.utils.checkpoint.checkpoint(lambda t: fastdpo.token_logps(t, labels), x, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], plain)
    with torch.no_grad():
        assert not fastdpo.token_logps(x, labels).requires_grad


def test_float64_gradcheck():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 5, -100, 0])
    assert torch.autograd.gradcheck(lambda x: fastdpo.token_logps(x, labels, softcap=2.0, temperature=0.7), logits)


@pytest.mark.parametrize("impl", IMPLS)
def test_edges(impl):
    logits = torch.randn(4, 9, device=device_for(impl), requires_grad=True)
    labels = torch.tensor([3, -100, 9, -7], device=logits.device)
    out = fastdpo.token_logps(logits, labels, impl=impl)
    truth = token_logprobs(logits.detach().cpu(), labels.cpu())["logps"]
    torch.testing.assert_close(out.detach().cpu().double(), truth, equal_nan=True)
    assert out[2:].isnan().all() and out[1] == 0
    empty = fastdpo.token_logps(logits[:0], labels[:0], impl=impl)
    assert empty.shape == (0,) and empty.requires_grad


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(3, 5, dtype=torch.int64)}, "logits is torch.int64"),
        ({"logits": torch.tensor(1.0)}, "logits has no dimension"),
        ({"logits": torch.zeros(3, 0)}, "vocabulary"),
        ({"labels": torch.zeros(4, dtype=torch.long)}, r"labels has shape \(4,\)"),
        ({"labels": torch.zeros(3)}, "labels is torch.float32"),
        ({"labels": torch.zeros(3, dtype=torch.long, device="meta")}, "labels is on meta"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"logits": torch.zeros(3, 5, dtype=torch.float64), "impl": "triton"}, "float64"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"logits": torch.zeros(3, 5), "labels": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        fastdpo.token_logps(**(arguments | change))


def test_triton_without_gpu_or_interpreter_says_what_to_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a GPU"):
        fastdpo.token_logps(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), impl="triton")
