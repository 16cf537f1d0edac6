"""linear_token_logps and linear_loss over drawn shapes, dtypes, options and budgets, against float64."""

import math

import loss_oracle
import oracle
import pytest
import torch
from drawing import draws
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import device_for

import fastdpo
from fastdpo.ops import budget

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
CASES = {
    "n": st.sampled_from([0, 1, 2, 7, 33, 60]),
    "d": st.sampled_from([1, 8, 24, 65]),
    "v": st.sampled_from([1, 2, 3, 127, 128, 500, 2049, 5000]),
    "dtype": st.sampled_from(DTYPES),
    "trained": st.sampled_from(["none", "hidden", "weight", "both", "bias"]),
    "with_bias": st.booleans(),
    "rows": st.sampled_from([1, 4, 20, 1000]),
    "kind": st.sampled_from(["normal", "peaked", "extreme"]),
    "ignored": st.sampled_from(["none", "some", "all"]),
    "options": st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.sampled_from([0.7, 2.0]),
            "softcap": st.sampled_from([3.0, 30.0]),
            "logit_scale": st.sampled_from([0.0625, 1.5]),
        },
    ),
    "seed": st.integers(0, 2**16),
}
SETTINGS = draws(200)


def draw(n, d, v, dtype, with_bias, kind, ignored, seed):
    generator = torch.Generator().manual_seed(seed)
    large = 1e3 if dtype == torch.float16 else 1e4  # not to overflow it
    scale = {"normal": 1.0, "peaked": 20.0, "extreme": large}[kind] / math.sqrt(d)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (scale * torch.randn(v, d, generator=generator)).to(dtype)
    bias = torch.randn(v, generator=generator).to(dtype) if with_bias else None
    labels = torch.randint(v, (n,), generator=generator)
    if ignored != "none":
        labels[:: 1 if ignored == "all" else 3] = -100
    return hidden, weight, bias, labels, torch.randn(n, generator=generator)


def naive(hidden, weight, labels, bias=None, **options):
    """The usual code: logits in the dtype of hidden, softmax in float32 (float64 for float64)."""
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    z = oracle.transformed(logits.to(torch.promote_types(logits.dtype, torch.float32)), **options)
    picked = z.log_softmax(-1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(labels >= 0, picked, 0.0)


def results(function, leaves, grad, **arguments):
    logps = function(**arguments)
    if not leaves:
        return [logps.detach()]
    return [logps.detach(), *torch.autograd.grad((logps * grad.to(logps.dtype)).sum(), leaves)]


def check(impl, monkeypatch, n, d, v, dtype, trained, with_bias, rows, kind, ignored, options, seed):
    if impl == "triton" and dtype == torch.float64:
        dtype = torch.float32
    monkeypatch.setattr(budget, "FULL_SPEED_ROWS", 4)  # so that some rows are kept and others are not
    device = device_for(impl)
    hidden, weight, bias, labels, grad = draw(n, d, v, dtype, with_bias, kind, ignored, seed)
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    wanted = {"none": [], "both": ["hidden", "weight", "bias"]}.get(trained, [trained])
    wanted = [name for name in wanted if tensors[name] is not None]

    def run(function, device="cpu", **more):
        moved = {k: None if t is None else t.detach().to(device) for k, t in tensors.items()}
        leaves = [moved[name].requires_grad_() for name in wanted]
        out = results(function, leaves, grad.to(device), **moved, labels=labels.to(device), **options, **more)
        return [t.cpu() for t in out]

    truth, usual = run(oracle.linear_token_logprobs), run(naive)
    ours = run(fastdpo.linear_token_logps, device, memory_budget=rows * v * dtype.itemsize, impl=impl)
    # The logits themselves are rounded alike in ours and in the naive code, but not to the same side.
    logits = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
    size = logits.abs().max() if logits.numel() else 0.0
    slope = options.get("logit_scale", 1.0) / options.get("temperature", 1.0)
    # In float64 the roundings of the oracle's own products count, too.
    eps = torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)
    tiny = eps * slope * size + 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * (2 + math.log(v))
    for name, exact, usually, got in zip(["logps", *wanted], truth, usual, ours, strict=True):
        assert got.dtype == (tensors[name].dtype if name != "logps" else torch.promote_types(dtype, torch.float32))
        exact = exact.double()
        # What one token or column adds up is bounded by its operands; the error is relative to that.
        operand = {"hidden": weight, "weight": hidden}.get(name)
        reach = 1.0 if name == "logps" else float(grad.abs().sum()) * (1.0 if operand is None or not operand.numel()
                                                                        else float(operand.abs().max()))  # fmt: skip
        naive_error = (usually.double() - exact).abs().nan_to_num(posinf=0.0).max() if exact.numel() else 0.0
        allowed = 2 * naive_error + reach * (tiny + (eps if name != "logps" else 0.0))
        assert got.isfinite().all()
        assert ((got.double() - exact).abs() <= allowed).all(), (name, (got.double() - exact).abs().max(), allowed)
    assert (ours[0][labels == -100] == 0).all()


@SETTINGS
@given(**CASES)
@example(n=33, d=24, v=2049, dtype=torch.bfloat16, trained="both", with_bias=True, rows=20, kind="normal",
         ignored="some", options={"softcap": 30.0}, seed=0)  # fmt: skip
def test_eager(monkeypatch, **case):
    check("eager", monkeypatch, **case)


@pytest.mark.device
@SETTINGS
@given(**CASES | {"n": st.sampled_from([0, 1, 2, 7, 11])})  # the interpreter takes its time for a row
def test_triton(monkeypatch, **case):
    check("triton", monkeypatch, **case)


@pytest.mark.parametrize("v", [32000, 128256, 151936, 262144])
@pytest.mark.parametrize("trained", ["hidden", "both"])
def test_large_vocabularies(monkeypatch, v, trained):
    check("eager", monkeypatch, 5, 16, v, torch.bfloat16, trained, False, 3, "normal", "some", {}, seed=v)


LOSS_CASES = {
    "pairs": st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    "v": st.sampled_from([2, 127, 1000]),
    "dtype": st.sampled_from([torch.float32, torch.float64]),
    "trained": st.sampled_from(["hidden", "weight", "both"]),
    "rows": st.sampled_from([1, 5, 12, 1000]),
    "counts": st.booleans(),
    "loss": st.sampled_from([("sigmoid", 0.0), ("sigmoid", 0.2), ("hinge", 0.0)]),
    "reduction": st.sampled_from(["mean", "sum"]),
    "outer": st.sampled_from([1.0, -3.0, 0.0]),
    "seed": st.integers(0, 2**16),
}


@draws(60)
@given(**LOSS_CASES)
def test_linear_loss(pairs, v, dtype, trained, rows, counts, loss, reduction, outer, seed):
    """Pairs of drawn lengths, empty ones and ones larger than the budget among them; a gradient other than 1."""
    generator = torch.Generator().manual_seed(seed)
    number, d = len(pairs), 12
    ids = [i for pair, (c, r) in enumerate(pairs) for i in [pair] * c + [number + pair] * r]
    ids, n = torch.tensor(ids, dtype=torch.int64), len(ids)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = torch.randn(v, d, generator=generator).to(dtype)
    labels, refs = torch.randint(v, (n,), generator=generator), torch.randn(2 * number, generator=generator)
    name, smoothing = loss
    leaves = [hidden.requires_grad_()] * (trained != "weight") + [weight.requires_grad_()] * (trained != "hidden")
    logps = oracle.linear_token_logprobs(hidden, weight, labels)
    sums = torch.zeros(2 * number, dtype=torch.float64).index_add(0, ids, logps)
    exact = loss_oracle.pair_losses(name, *sums.view(2, -1), *refs.double().view(2, -1), 0.3, smoothing)
    total = outer * (exact.mean() if reduction == "mean" else exact.sum())
    expected = torch.autograd.grad(total, leaves)
    order = torch.arange(n) if counts else torch.randperm(n, generator=generator)
    shuffled = hidden[order]
    out = fastdpo.linear_loss(
        shuffled, weight, labels[order], refs, sequence_ids=ids[order], beta=0.3, loss_type=name,
        label_smoothing=smoothing, reduction=reduction, memory_budget=rows * v * dtype.itemsize,
        tokens_per_pair=[c + r for c, r in pairs] if counts else None,
    )  # fmt: skip
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close((outer * out.loss).double(), total, **tolerance)
    torch.testing.assert_close(out.losses.double(), exact.detach(), **tolerance)
    for got, want in zip(torch.autograd.grad(outer * out.loss, leaves), expected, strict=True):
        torch.testing.assert_close(got, want, **tolerance)
