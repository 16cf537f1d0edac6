"""linear_token_logps against float64, in each of its ways."""

import pytest
import torch
from drawing import pairwise
from oracle import linear_token_logprobs
from tiny import device_for

import fastdpo

IMPLS = ["eager", "triton"]


def draw(n=37, d=16, v=131, dtype=torch.float32, bias=False, seed=0, device="cpu"):
    """hidden, weight, labels (a fifth of them ignored), bias or None, dL/dlogps."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(v, d, generator=generator)).to(dtype)
    labels = torch.randint(v, (n,), generator=generator)
    labels[::5] = -100
    offset = torch.randn(v, generator=generator).to(dtype) if bias else None
    grad = torch.randn(n, generator=generator)
    offset = None if offset is None else offset.to(device)
    return hidden.to(device), weight.to(device), labels.to(device), offset, grad.to(device)


@pytest.mark.parametrize("impl, trained, rows_a_tile, options", pairwise(
    IMPLS,
    ["both", "hidden", "weight", "none"],
    [1, 7, 1000],
    [{}, {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3}, {"bias": True}],
), ids=str)  # fmt: skip
def test_values_and_gradients(impl, trained, rows_a_tile, options):
    hidden, weight, labels, bias, grad = draw(bias=options.get("bias", False), device=device_for(impl))
    options = {name: value for name, value in options.items() if name != "bias"}
    leaves = {
        "hidden": hidden.requires_grad_(trained in ("both", "hidden")),
        "weight": weight.requires_grad_(trained in ("both", "weight")),
    }
    if bias is not None:
        leaves["bias"] = bias.requires_grad_(trained in ("both", "weight"))
    wanted = [name for name, leaf in leaves.items() if leaf.requires_grad]
    budget = rows_a_tile * weight.shape[0] * 4
    ours = fastdpo.linear_token_logps(hidden, weight, labels, bias=bias, memory_budget=budget, impl=impl, **options)
    truth = linear_token_logprobs(hidden, weight, labels, bias=bias, **options)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    assert (ours[labels == -100] == 0).all()
    if not wanted:
        assert not ours.requires_grad
        return
    got = torch.autograd.grad((ours * grad).sum(), [leaves[name] for name in wanted])
    exact = torch.autograd.grad((truth * grad.double()).sum(), [leaves[name] for name in wanted])
    for name, a, b in zip(wanted, got, exact, strict=True):
        assert a.dtype == leaves[name].dtype
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_naive(dtype):
    hidden, weight, labels, _, grad = draw(n=64, d=32, v=500, dtype=dtype)
    hidden.requires_grad_()
    weight.requires_grad_()

    def grads(logps):
        return torch.autograd.grad((logps * grad).sum(), [hidden, weight])

    truth = linear_token_logprobs(hidden, weight, labels)
    naive = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    naive = torch.where(labels >= 0, naive, 0.0)
    ours = fastdpo.linear_token_logps(hidden, weight, labels, memory_budget=500 * 2 * 16)
    for a, b, c in zip([truth, *grads(truth)], [naive, *grads(naive)], [ours, *grads(ours)], strict=True):
        naive_error, our_error = ((x.double() - a.double()).abs().max() for x in (b, c))
        assert our_error <= 2 * naive_error + 1e-6


def test_double_precision_gradcheck():
    hidden, weight, labels, bias, _ = draw(n=5, d=3, v=7, dtype=torch.float64, bias=True)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]

    def function(h, w, b):
        return fastdpo.linear_token_logps(h, w, labels, bias=b, softcap=2.0, memory_budget=2 * 7 * 8)

    assert torch.autograd.gradcheck(function, leaves)


def test_no_tokens_and_all_ignored():
    hidden, weight, labels, _, _ = draw()
    hidden.requires_grad_()
    empty = fastdpo.linear_token_logps(hidden[:0], weight, labels[:0])
    assert empty.shape == (0,) and empty.requires_grad
    ignored = fastdpo.linear_token_logps(hidden, weight, torch.full_like(labels, -100))
    assert (ignored == 0).all()
    ignored.sum().backward()
    assert (hidden.grad == 0).all()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_second_backward_gives_the_same(frozen):
    hidden, weight, labels, _, grad = draw()
    leaves = [hidden.requires_grad_()] + ([] if frozen else [weight.requires_grad_()])
    out = (fastdpo.linear_token_logps(hidden, weight, labels) * grad).sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(3 * out, leaves), strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_gradient_of_the_gradient_raises(frozen):
    hidden, weight, labels, _, _ = draw()
    leaves = [hidden.requires_grad_()] + ([] if frozen else [weight.requires_grad_()])
    out = fastdpo.linear_token_logps(hidden, weight, labels).square().sum()
    with pytest.raises(NotImplementedError, match="linear_token_logps has no second derivative"):
        first = torch.autograd.grad(out, leaves, create_graph=True)
        assert not frozen  # there what is saved does not lead back to the hidden states, so not even the first is given
        first[0].sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
def test_repeated_runs_are_bitwise_equal(impl):
    hidden, weight, labels, _, grad = draw(n=300, v=700, device=device_for(impl))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    runs = []
    for _ in range(3):
        out = fastdpo.linear_token_logps(hidden, weight, labels, memory_budget=70 * 700 * 4, impl=impl)
        runs.append([out, *torch.autograd.grad((out * grad).sum(), leaves)])
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_strided_hidden_and_weight():
    base, weight, labels, _, grad = draw(n=40, d=32)
    hidden = base[:, ::2].detach().requires_grad_()
    weight = weight[:, :16].T.contiguous().T.detach().requires_grad_()
    assert not hidden.is_contiguous() and not weight.is_contiguous()
    for budget in (None, 7 * weight.shape[0] * 4):
        ours = fastdpo.linear_token_logps(hidden, weight, labels, memory_budget=budget)
        truth = linear_token_logprobs(hidden, weight, labels)
        got = torch.autograd.grad((ours * grad).sum(), [hidden, weight])
        exact = torch.autograd.grad((truth * grad.double()).sum(), [hidden, weight])
        for a, b in zip(got, exact, strict=True):
            torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-5)


def test_tied_embeddings_get_both_gradients():
    _, table, labels, _, _ = draw(n=12, d=8, v=50)
    table.requires_grad_()
    tokens = torch.arange(12)
    ours = fastdpo.linear_token_logps(table[tokens], table, labels).sum()
    truth = linear_token_logprobs(table[tokens], table, labels).sum()
    (got,), (exact,) = (torch.autograd.grad(total, table) for total in (ours, truth))
    torch.testing.assert_close(got, exact.float(), rtol=1e-4, atol=1e-5)


def test_a_float32_head_on_a_bfloat16_model():
    """The log-probs of float32 products of the bfloat16 values, not of logits rounded to bfloat16."""
    hidden, weight, labels, bias, grad = draw(n=64, d=48, v=900, dtype=torch.bfloat16, bias=True)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    ours = fastdpo.linear_token_logps(hidden, weight, labels, bias=bias, head_dtype=torch.float32)
    truth = linear_token_logprobs(hidden, weight, labels, bias=bias)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    got = torch.autograd.grad((ours * grad).sum(), leaves)
    exact = torch.autograd.grad((truth * grad.double()).sum(), leaves)
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a.double() - b).abs().max() <= 2**-8 * b.abs().max()  # one rounding to bfloat16, of each tensor


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("rows_a_tile", [9, 1000])
def test_weight_of_another_dtype(dtypes, rows_a_tile, monkeypatch):
    from fastdpo_kernels import linear_logprobs

    monkeypatch.setattr(linear_logprobs, "CAST_BYTES", 32 * 4 * 100)  # five slabs of the vocabulary
    hidden, weight, labels, _, grad = draw(n=50, d=32, v=500)
    hidden, weight = hidden.to(dtypes[0]).requires_grad_(), weight.to(dtypes[1]).requires_grad_()
    budget = rows_a_tile * 500 * dtypes[0].itemsize
    ours = fastdpo.linear_token_logps(hidden, weight, labels, memory_budget=budget)
    naive = torch.log_softmax((hidden @ weight.to(hidden.dtype).T).float(), -1)
    naive = torch.where(labels >= 0, naive.gather(1, labels.clamp(min=0)[:, None]).squeeze(1), 0.0)
    truth = linear_token_logprobs(hidden, weight, labels)
    results = []
    for logps in (truth, naive, ours):
        results.append([logps, *torch.autograd.grad((logps * grad).sum(), [hidden, weight])])
    for a, b, c in zip(*results, strict=True):
        naive_error, our_error = ((x.double() - a.double()).abs().max() for x in (b, c))
        assert our_error <= 2 * naive_error + 1e-6
    assert [g.dtype for g in results[2][1:]] == list(dtypes)


def test_autocast_runs_the_products_in_its_dtype():
    hidden, weight, labels, _, _ = draw(n=64, d=48, v=900)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        ours = fastdpo.linear_token_logps(hidden, weight, labels)
    plain = fastdpo.linear_token_logps(hidden.bfloat16(), weight.bfloat16(), labels)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    for grad, leaf in zip(torch.autograd.grad(ours.sum(), leaves), leaves, strict=True):
        assert grad.dtype == leaf.dtype == torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    hidden, weight, labels, _, grad = draw()
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]

    def total(h, w):
        return (fastdpo.linear_token_logps(h * 2, w, labels) * grad).sum()

    plain = torch.autograd.grad(total(*leaves), leaves)
    torch.utils.checkpoint.checkpoint(total, *leaves, use_reentrant=reentrant).backward()
    for leaf, expected in zip(leaves, plain, strict=True):
        assert torch.equal(leaf.grad, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "hidden has shape"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.long)}, "hidden is torch.int64"),
        ({"weight": torch.zeros(5, 3)}, "weight has shape"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "labels has shape"),
        ({"labels": torch.zeros(3)}, "labels is torch.float32"),
        ({"bias": torch.zeros(4)}, "bias has shape"),
        ({"weight": torch.zeros(0, 4)}, "vocabulary"),
        ({"weight": torch.zeros(5, 4, device="meta")}, "weight is on meta"),
        ({"labels": torch.zeros(3, dtype=torch.long, device="meta")}, "labels is on meta"),
        ({"bias": torch.zeros(5, device="meta")}, "bias is on meta"),
        ({"memory_budget": -1}, "memory_budget is -1"),
        ({"memory_budget": 0}, "memory_budget is 0"),
        ({"memory_budget": 1e9}, "memory_budget is 1000000000.0"),
        ({"head_dtype": torch.int8}, "head_dtype is torch.int8"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"softcap": -2.0}, "softcap is -2.0"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        fastdpo.linear_token_logps(**(arguments | change))
