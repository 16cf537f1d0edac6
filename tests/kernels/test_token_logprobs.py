"""logits -> logps and back: Triton and eager against the float64 oracle and the naive code.

Without a GPU the Triton kernels run in the interpreter; with one they run on it, and so does the eager code.
"""

import math
import mmap
import types

import oracle
import pytest
import torch
from drawing import draws, pairwise
from hypothesis import given
from hypothesis import strategies as st
from kernel_implementations import implementations
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdpo_kernels import eager

try:
    import triton_interpreter

    from fastdpo_kernels import token_logprobs, token_logprobs_grad

    triton_interpreter.mend()
    triton_kernels = types.SimpleNamespace(
        token_logprobs_fwd=token_logprobs.token_logprobs_fwd,
        token_logprobs_bwd=token_logprobs.token_logprobs_bwd,
        token_logprobs_fwd_grad=token_logprobs_grad.token_logprobs_fwd_grad,
    )
except ImportError:
    triton_kernels = None

CUDA = torch.cuda.is_available()
IMPLEMENTATIONS = implementations(eager, triton_kernels)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> tuple[types.ModuleType, str]:
    return request.param


def run(implementation, logits: Tensor, labels: Tensor, grad: Tensor, *, stats=True, in_place=False, **options):
    """logps, lse = max z + log sum exp(z - max z), stats and gradient, on the CPU."""
    module, device = implementation
    x = logits.to(device) if device != "cpu" else logits
    if in_place:
        x = x.clone()
    y, g = labels.to(device), grad.to(device)
    logps, norms, statistics = module.token_logprobs_fwd(x, y, stats=stats, **options)
    out = x if in_place else torch.full_like(x, torch.nan)
    gradient = module.token_logprobs_bwd(x, y, norms, g, out=out, **options)
    assert gradient is out and gradient.dtype == logits.dtype
    result = {"logps": logps, "lse": norms.sum(0), "gradient": gradient}
    if stats:
        result["stats"] = statistics
    else:
        assert statistics is None
    return {name: value.cpu() for name, value in result.items()}


def naive(logits: Tensor, labels: Tensor, grad: Tensor, ignore_index: int = -100, **options):
    """The usual code in float32 (float64 for float64): what the errors are measured by."""
    n, v = logits.shape
    x = logits.clone().requires_grad_()
    z = oracle.transformed(x.double() if x.dtype == torch.float64 else x.float(), **options)
    log_softmax = z.log_softmax(-1)
    logps = log_softmax.gather(1, labels.clamp(0, v - 1).unsqueeze(1)).squeeze(1)
    kept = labels != ignore_index
    (gradient,) = torch.autograd.grad((grad.to(z.dtype) * logps)[kept].sum(), x)
    z, log_softmax = z.detach(), log_softmax.detach()
    p = log_softmax.exp()
    stats = [
        -torch.where(p > 0, p * log_softmax, 0).sum(1),
        z.mean(1),
        torch.zeros(n),
        (p * p).sum(1).log(),
    ]
    return {"logps": logps.detach(), "lse": z.logsumexp(1), "stats": torch.stack(stats), "gradient": gradient}


def error(value: Tensor, truth: Tensor) -> Tensor:
    """|value - truth|, 0 where both are the same infinity or NaN, infinite where only one of them is."""
    value = value.double()
    same = (value == truth) | (value.isnan() & truth.isnan())
    return torch.where(same, 0.0, (value - truth).abs().nan_to_num(nan=math.inf))


def check(implementation, logits: Tensor, labels: Tensor, grad: Tensor, **options):
    """Every output within twice the naive error of its row, plus two roundings of what it is computed from.

    For lse and the mean that is z. Log-probs, gradient, entropy and log sum p^2 see only the differences of z, so the
    size of z counts there only if the transform rounds z.
    """
    result = run(implementation, logits, labels, grad, **options)
    truth = oracle.token_logprobs(logits, labels, **options)
    truth["gradient"] = oracle.token_logprobs_gradient(logits, labels, grad, **options)
    usual = naive(logits, labels, grad, **options)

    precision = torch.float64 if logits.dtype == torch.float64 else torch.float32
    transform = {k: v for k, v in options.items() if k != "ignore_index"}
    z = oracle.transformed(logits.double(), **transform)
    slope = abs(options.get("logit_scale", 1.0)) / options.get("temperature", 1.0)
    z_is_exact = options.get("softcap") is None and math.frexp(slope)[0] == 0.5
    size = z.abs().masked_fill(~z.isfinite(), 0).amax(1)  # (N,)
    roundings = 8 if precision == torch.float64 else 2  # in float64 the oracle's own count too
    eps = roundings * torch.finfo(precision).eps
    of_differences = eps * (2 + math.log(logits.shape[1]) + (0 if z_is_exact else size))
    of_z = eps * (2 + math.log(logits.shape[1]) + size)

    def assert_close(name: str, got: Tensor, want: Tensor, naive_value: Tensor, tiny: Tensor) -> None:
        naive_error = error(naive_value, want).nan_to_num(posinf=0)
        wrong = ~(error(got, want) <= 2 * naive_error + tiny + eps * want.abs().nan_to_num(posinf=0))
        assert not wrong.any(), (name, got[wrong], want[wrong], naive_value[wrong])

    assert result["logps"].dtype == result["lse"].dtype == result["stats"].dtype == precision
    assert_close("logps", result["logps"], truth["logps"], usual["logps"], of_differences)
    assert_close("lse", result["lse"], truth["lse"], usual["lse"], of_z)
    entropy, mean, top1, log_sum_p2 = result["stats"]
    assert_close("entropy", entropy, truth["stats"][0], usual["stats"][0], of_differences)
    assert_close("mean logit", mean, truth["stats"][1], usual["stats"][1], of_z)
    assert_close("log sum p^2", log_sum_p2, truth["stats"][3], usual["stats"][3], of_differences)
    gap = z.amax(1) - z.gather(1, labels.clamp(0, z.shape[1] - 1).unsqueeze(1)).squeeze(1)
    clear = (gap == 0) | (gap > of_z)  # else z differ by less than a rounding
    assert torch.equal(top1.double()[clear], truth["stats"][2][clear])

    got, want = result["gradient"], truth["gradient"]
    limits = torch.finfo(logits.dtype)
    roundings = getattr(implementation[0], "roundings", 1)
    rounding = roundings * limits.eps / 2 * want.abs() + limits.smallest_normal * limits.eps
    naive_error = error(usual["gradient"], want).nan_to_num(posinf=0).amax(1, keepdim=True)
    allowed = 2 * naive_error + rounding + (of_differences * slope * grad.abs().double()).unsqueeze(1)
    wrong = ~(error(got, want) <= allowed) & ~want.isnan()
    assert not wrong.any(), (got[wrong], want[wrong], usual["gradient"][wrong])
    assert torch.equal(got.isnan(), want.isnan())
    return result


def draw_logits(n: int, v: int, dtype: torch.dtype, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, v, generator=generator)
    if kind == "extreme":
        x = 1e4 * x.sign()
    elif kind == "wide":
        x = 1e4 * x.clamp(-1, 1)
    elif kind == "offset":
        x = x + 1e4
    elif kind == "peaked":
        x = x * 10
    elif kind == "masked":
        mask = torch.rand(n, v, generator=generator) < 0.7
        mask[:, 0] = False  # a row without a legal token has no softmax
        x = x.masked_fill(mask, -math.inf)
    return x.to(dtype)


SIZES = [1, 2, 3, 127, 128, 1000, 2049, 4096, 4097, 9000]
LABELS = st.one_of(st.integers(0, 9000), st.sampled_from(["ignored", "below", "v", "above"]))


@draws(120)
@given(
    v=st.sampled_from(SIZES),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["normal", "peaked", "extreme", "wide", "offset", "masked"]),
    row_gap=st.sampled_from([0, 1, 8, 16]),
    labels=st.lists(LABELS, max_size=5),
    ignore_index=st.sampled_from([-100, 0, -1]),
    temperature=st.sampled_from([1.0, 0.7, 2.0]),
    softcap=st.sampled_from([None, 30.0, 2.0, 1000.0]),
    logit_scale=st.sampled_from([1.0, 0.0625, 1.5, -0.5]),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_float64(implementation, v, dtype, kind, row_gap, labels, ignore_index, seed, **options):
    if dtype == torch.float64 and implementation[0] is triton_kernels:
        dtype = torch.float32
    logits = draw_logits(len(labels), v + row_gap, dtype, kind, seed)[:, :v]
    if kind == "masked" and options["logit_scale"] < 0:
        logits = -logits  # z of a mask is -inf
    special = {"ignored": ignore_index, "below": -7, "v": v, "above": v + 2**33}
    numbers = [special[label] if isinstance(label, str) else int(label) % v for label in labels]
    grad = torch.randn(len(labels), generator=torch.Generator().manual_seed(seed + 1))
    check(implementation, logits, torch.tensor(numbers, dtype=torch.int64), grad, ignore_index=ignore_index, **options)


@pytest.mark.parametrize("v", [32000, 49152, 128256, 151936, 262144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_vocabularies(implementation, v, dtype):
    logits = draw_logits(2, v, dtype, "peaked", seed=v)
    labels = torch.tensor([int(logits[0].argmax()), v - 1])
    result = check(implementation, logits, labels, torch.tensor([1.0, -0.5]))
    assert result["stats"][2].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("softcap", [30.0, 32.0, 33.0])
def test_softcap_of_bf16_logits_errs_by_a_few_millionths(implementation, softcap):
    """By 4e-6 nats in the label's logit and in the log-sum-exp, where their errors do not cancel."""
    logits = torch.linspace(-3, 3, 4096).mul(torch.tensor([[0.01], [1.0], [10.0], [100.0]])).bfloat16()
    for label in (0, 2000, 2600, 4095):
        labels = torch.full((4,), label)
        result = run(implementation, logits, labels, torch.ones(4), softcap=softcap)
        truth = oracle.token_logprobs(logits, labels, softcap=softcap)
        assert (result["logps"].double() - truth["logps"]).abs().max() <= 8e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_logit_alone_has_all_the_mass(implementation, dtype):
    """Wherever it stands: in the lead, any vector of a block, the masked block or the tail; every other is masked."""
    module, device = implementation
    v = 4096 + 2048 + 13
    places = torch.tensor([0, 3, 8, 4095, 4096, 4104, 5000, 6144, v - 5, v - 1])
    logits = torch.full((len(places), v), -math.inf).scatter(1, places[:, None], 7.5).to(dtype)
    for placed in (Placed(module, gap=0, offset=0), ByFwdGrad(module, 1, 3)):
        for options in ({}, {"logit_scale": -1.0}):
            x = -logits if options else logits
            result = run((placed, device), x, places, torch.ones(len(places)), **options)
            assert not result["gradient"].any()
            assert (result["logps"] <= 0).all() and (result["logps"] >= -1e-6).all()
            assert result["stats"][[0, 3]].abs().max() <= 1e-6
            assert (result["stats"][2] == 1).all() and (result["stats"][1] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_logits_masked_by_the_least_number(implementation, dtype):
    """Not by -inf: where the label is one of them, its log-prob is that number."""
    module, device = implementation
    logits = torch.randn(3, 5003).masked_fill(torch.arange(5003) % 3 == 1, torch.finfo(dtype).min).to(dtype)
    labels = torch.tensor([1, 0, 5001])
    for placed in (Placed(module, gap=0, offset=0), ByFwdGrad(module, 1, 3)):
        result = run((placed, device), logits, labels, torch.ones(3), stats=False)
        assert result["logps"][0] == logits[0, 1] and (result["logps"][1:] > -20).all()
        truth = oracle.token_logprobs_gradient(logits, labels, torch.ones(3))
        torch.testing.assert_close(result["gradient"].double(), truth, rtol=2.0**-6, atol=1e-6)


def test_no_rows(implementation):
    empty = torch.zeros(0)
    result = run(implementation, torch.zeros(0, 33), torch.zeros(0, dtype=torch.int64), empty)
    assert {name: tuple(value.shape) for name, value in result.items()} == {
        "logps": (0,),
        "lse": (0,),
        "gradient": (0, 33),
        "stats": (4, 0),
    }


@pytest.mark.parametrize("in_place", [False, True])
def test_ignored_rows_are_not_read(implementation, in_place):
    logits = torch.randn(6, 5000)
    labels = torch.tensor([3, -100, 4999, -100, -100, 0])
    ignored = labels == -100
    grad = torch.ones(6).masked_fill(ignored, math.nan)
    expected = run(implementation, logits, labels, grad)
    result = run(implementation, logits.masked_fill(ignored[:, None], math.nan), labels, grad, in_place=in_place)
    for name, value in result.items():
        assert torch.equal(value, expected[name]), name
    assert not result["logps"][ignored].any() and not result["lse"][ignored].any()
    assert not result["stats"][:, ignored].any() and not result["gradient"][ignored].any()
    assert result["gradient"][~ignored].any(1).all()


def test_all_ignored(implementation):
    logits = torch.full((3, 100), math.nan, dtype=torch.bfloat16)
    result = run(implementation, logits, torch.full((3,), -100), torch.full((3,), math.nan), in_place=True)
    assert all(not value.any() for value in result.values())


@pytest.mark.parametrize("label", [-1, 64, 2**40, -(2**40)])
def test_labels_out_of_range_give_nan(implementation, label):
    result = run(implementation, torch.randn(2, 64), torch.tensor([5, label]), torch.ones(2))
    assert result["logps"].isnan().tolist() == [False, True]
    assert result["gradient"].isnan().all(1).tolist() == [False, True]
    assert result["gradient"].isnan().any(1).tolist() == [False, True]
    assert result["lse"].isfinite().all() and result["stats"].isfinite().all()


def test_masked_labels_and_rows(implementation):
    logits = torch.zeros(2, 10)
    logits[0, :9] = -math.inf
    logits[1] = -math.inf
    result = run(implementation, logits, torch.tensor([0, 0]), torch.ones(2))
    assert result["logps"][0] == -math.inf and result["logps"][1].isnan()  # as log_softmax
    assert result["lse"].tolist() == [0.0, -math.inf]
    assert result["stats"][:, 0].tolist() == [0.0, -math.inf, 0.0, 0.0]
    assert result["gradient"][0].tolist() == [1.0, *[0.0] * 8, -1.0]


@pytest.mark.parametrize("softcap", [None, 15.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_place_equals_out_of_place_and_repeats_are_equal(implementation, dtype, softcap):
    logits = torch.randn(7, 6000).to(dtype)
    labels = torch.tensor([0, 5999, -100, 17, -100, -1, 4096])
    grad = torch.randn(7)
    options = {"temperature": 0.8, "softcap": softcap}
    first = run(implementation, logits, labels, grad, **options)
    for in_place in (False, True):
        again = run(implementation, logits, labels, grad, in_place=in_place, **options)
        for name, value in first.items():
            torch.testing.assert_close(again[name], value, rtol=0, atol=0, equal_nan=True)
    without_stats = run(implementation, logits, labels, grad, stats=False, **options)
    torch.testing.assert_close(without_stats["logps"], first["logps"], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_rows_of_the_gradient_sum_to_zero(implementation):
    logits, labels, grad = 3 * torch.randn(5, 5003), torch.randint(0, 5003, (5,)), torch.randn(5)
    sums = run(implementation, logits, labels, grad, temperature=0.5)["gradient"].double().sum(1)
    assert (sums.abs() <= 2e-5 * grad.abs()).all(), sums


def test_strided_rows_of_logits_and_gradient(implementation):
    module, device = implementation
    wide = torch.randn(4, 3000, device=device)
    target = torch.full((4, 2100), 7.0, device=device)
    labels, grad = torch.tensor([1, 2, -100, 1999], device=device), torch.randn(8, device=device)[::2]
    logits, out = wide[:, 500:2500], target[:, 100:2100]
    _, norms, _ = module.token_logprobs_fwd(logits, labels)
    module.token_logprobs_bwd(logits, labels, norms, grad, out=out)
    expected = run(implementation, logits.cpu().contiguous(), labels.cpu(), grad.cpu())["gradient"]
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-6, atol=1e-7)
    assert (target[:, :100] == 7.0).all()


def test_addresses_beyond_2_to_the_31(implementation):
    """Rows 2^30 elements apart; on a CPU the pages between them are never touched."""
    module, device = implementation
    count, v, stride = 2**31 + 2**12, 4096, 2**30
    if device == "cpu":
        memory = torch.frombuffer(mmap.mmap(-1, 2 * count), dtype=torch.bfloat16)
    else:
        memory = torch.empty(count, dtype=torch.bfloat16, device=device)
    logits = memory.as_strided((3, v), (stride, 1))
    logits.copy_(torch.randn(3, v))
    plain, labels, grad = logits.cpu().contiguous(), torch.tensor([7, 8, 9]), torch.randn(3)
    expected = run(implementation, plain, labels, grad)
    labels, grad = labels.to(device), grad.to(device)
    logps, norms, _ = module.token_logprobs_fwd(logits, labels)
    module.token_logprobs_bwd(logits, labels, norms, grad, out=logits)
    torch.testing.assert_close(logps.cpu(), expected["logps"], rtol=1e-6, atol=1e-6)
    assert torch.equal(logits.cpu(), expected["gradient"])


class Placed:
    """A module whose functions are handed copies of the logits and of `out` with these row strides and offsets.

    NaN lies around the logits and must not matter; 7.0 lies around `out` and must stay.
    """

    def __init__(self, module, gap: int, offset: int, out_gap: int | None = None, out_offset: int = 0):
        """Gaps between rows and offsets from a 16-byte boundary, in elements; in place without an `out_gap`."""
        self.module, self.gap, self.offset, self.out_gap, self.out_offset = module, gap, offset, out_gap, out_offset

    def token_logprobs_fwd(self, x: Tensor, labels: Tensor, **options):
        _, rows = place(x, self.gap, self.offset, math.nan)
        return self.module.token_logprobs_fwd(rows, labels, **options)

    def token_logprobs_bwd(self, x: Tensor, labels: Tensor, norms: Tensor, grad: Tensor, *, out: Tensor, **options):
        if self.out_gap is None:
            memory, target = place(x, self.gap, self.offset, 7.0)
            rows = target
        else:
            _, rows = place(x, self.gap, self.offset, math.nan)
            memory, target = place(out, self.out_gap, self.out_offset, 7.0)
        assert self.module.token_logprobs_bwd(rows, labels, norms, grad, out=target, **options) is target
        out.copy_(target)
        target.fill_(7.0)
        assert (memory == 7.0).all()
        return out


def place(x: Tensor, gap: int, offset: int, around: float) -> tuple[Tensor, Tensor]:
    """A copy of x (N, V) whose rows are `gap` elements apart, `offset` from a 16-byte boundary; the memory it is in."""
    n, v = x.shape
    memory = torch.full((offset + n * (v + gap) + 8,), around, dtype=x.dtype, device=x.device)
    assert memory.data_ptr() % 16 == 0
    rows = memory.as_strided((n, v), (v + gap, 1), offset)
    return memory, rows.copy_(x)


HALF_AND_SINGLE = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("v, dtype, offset", pairwise([1, 5, 16, 31, 4097], HALF_AND_SINGLE, range(8)))
def test_rows_at_any_address(implementation, v, dtype, offset):
    module, device = implementation
    logits = draw_logits(4, v, dtype, "peaked", seed=v + offset)
    labels = torch.tensor([0, v - 1, -100, v // 2])
    grad = torch.tensor([1.0, -0.5, 3.0, 2.0])
    other = (offset + 3) % 8
    for placed in (
        Placed(module, gap=0, offset=offset),
        Placed(module, gap=offset, offset=1),
        Placed(module, gap=1, offset=offset, out_gap=1, out_offset=offset),
        Placed(module, gap=0, offset=offset, out_gap=other, out_offset=0),
        Placed(module, gap=offset, offset=0, out_gap=-v % 8, out_offset=0),
    ):
        check((placed, device), logits, labels, grad)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
@pytest.mark.parametrize("v", [2047, 4095, 8191, 8193, 50257])
def test_vocabularies_around_the_edges_of_blocks(implementation, v, dtype):
    module, device = implementation
    logits = draw_logits(3, v, dtype, "masked", seed=v)
    labels, grad = torch.tensor([int(logits[0].argmax()), v - 1, 0]), torch.tensor([1.0, -0.5, 0.25])
    options = {"softcap": 20.0, "temperature": 0.7}
    check((Placed(module, gap=0, offset=0), device), logits, labels, grad)
    check((Placed(module, gap=2, offset=5, out_gap=2, out_offset=5), device), logits, labels, grad, **options)
    check((Placed(module, gap=1, offset=1, out_gap=0, out_offset=0), device), logits, labels, grad, **options)


class ByFwdGrad:
    """A module whose forward and backward are one call of `token_logprobs_fwd_grad`, for gradients of 1."""

    roundings = 2  # where the kernel writes q, and where its factor is applied here

    def __init__(self, module, gap: int, offset: int):
        self.module, self.gap, self.offset = module, gap, offset

    def token_logprobs_fwd(self, x: Tensor, labels: Tensor, *, stats: bool, **options):
        _, norms, _ = self.module.token_logprobs_fwd(x, labels, **options)
        self.memory, self.gradient = place(x, self.gap, self.offset, 7.0)
        logps, scale, statistics = self.module.token_logprobs_fwd_grad(self.gradient, labels, stats=stats, **options)
        self.scale = 1.0 if scale is None else scale[:, None]
        return logps, norms, statistics

    def token_logprobs_bwd(self, x: Tensor, labels: Tensor, norms: Tensor, grad: Tensor, *, out: Tensor, **options):
        assert (grad == 1.0).all()
        out.copy_(self.scale * self.gradient)
        self.gradient.fill_(7.0)
        assert (self.memory == 7.0).all()
        return out


@pytest.mark.parametrize("v, kind, dtype, options", pairwise(
    [3, 1000, 4097, 13000],
    ["peaked", "rising", "masked"],
    HALF_AND_SINGLE,
    [{}, {"softcap": 15.0, "temperature": 0.8}, {"logit_scale": 0.0625}, {"softcap": 40.0, "logit_scale": -1.0}],
))  # fmt: skip
def test_forward_with_gradient(implementation, v, kind, dtype, options):
    """Of logits that rise over the row, too: by up to 100 from one block to the next."""
    module, device = implementation
    logits = draw_logits(6, v, dtype, "peaked" if kind == "rising" else kind, seed=v)
    if kind == "rising":
        logits += torch.linspace(0, 300, v).mul(torch.tensor([1.0, 0.1, 1.0, 1.0, 1.0, -1.0])[:, None]).to(dtype)
    labels = torch.tensor([0, v - 1, -100, v, -1, v // 2])
    for gap, offset in ((0, 0), (1, 3)):
        result = check((ByFwdGrad(module, gap, offset), device), logits, labels, torch.ones(6), **options)
        assert not result["gradient"][2].any() and result["gradient"][3:5].isnan().all()
        without_stats = run(
            (ByFwdGrad(module, gap, offset), device), logits, labels, torch.ones(6), stats=False, **options
        )
        torch.testing.assert_close(without_stats["logps"], result["logps"], rtol=1e-6, atol=1e-6, equal_nan=True)


def test_forward_with_gradient_does_not_read_ignored_rows(implementation):
    module, device = implementation
    for labels in ([3, -100, 4999, -100], [-100] * 4, []):
        ignored = torch.tensor(labels, dtype=torch.int64) == -100
        logits = torch.randn(len(labels), 5000).masked_fill(ignored[:, None], math.nan).to(device)
        logps, scale, stats = module.token_logprobs_fwd_grad(
            logits, torch.tensor(labels, dtype=torch.int64).to(device), stats=True
        )
        assert scale is None or scale.isfinite().all()
        assert logps.shape == (len(labels),) and stats.shape == (4, len(labels))
        for value in (logps.cpu(), stats.cpu().T, logits.cpu()):
            assert value.isfinite().all() and not value[ignored].any()
        assert logits.cpu()[~ignored].any(1).all()


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest tensor that an operator inside returns, arguments and views of them apart."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_eager_allocates_chunks_only(dtype):
    logits, labels, grad = torch.randn(96, 50000).to(dtype), torch.randint(0, 50000, (96,)), torch.ones(96)
    with LargestAllocation() as largest:
        _, norms, _ = eager.token_logprobs_fwd(logits, labels, stats=True, softcap=30.0)
        eager.token_logprobs_bwd(logits, labels, norms, grad, softcap=30.0, out=logits)
    assert largest.bytes <= 4 * 2**20 < logits.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
def test_eager_does_not_wait_for_the_device():
    logits, labels = torch.randn(64, 1000, device="cuda"), torch.randint(0, 1000, (64,), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, norms, _ = eager.token_logprobs_fwd(logits, labels, stats=True)
        eager.token_logprobs_bwd(logits, labels, norms, torch.ones_like(norms[0]), out=logits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
