"""The gather of keys and values and its gradient: Triton and eager against float64 and the naive code.

Without a GPU the Triton kernels run in the interpreter; with one they run on it, and so does the eager code.
"""

import math
import mmap

import pytest
import torch
from drawing import draws, pairwise
from hypothesis import given
from hypothesis import strategies as st
from kernel_implementations import implementations, without_triton
from torch import Tensor

from fastdpo_kernels import eager

try:
    import triton_interpreter

    from fastdpo_kernels import gather_kv as triton_kernels

    triton_interpreter.mend()
except ImportError:
    triton_kernels = None

CUDA = torch.cuda.is_available()
NO_TRITON = without_triton(triton_kernels)
IMPLEMENTATIONS = implementations(eager, triton_kernels)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# Memory of (rows, H, d): as a projection writes it, transposed, a slice of something wider at no 16-byte boundary, one
# head seen as many, and elements that are no neighbours.
LAYOUTS = ["tokens", "heads", "slice", "expanded", "apart"]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    return request.param


def place(x: Tensor, layout: str, device: str) -> Tensor:
    """x (rows, H, d) in memory of this layout, NaN around it."""
    rows, heads, d = x.shape
    if layout == "tokens":
        return x.to(device, copy=True).contiguous()
    if layout == "heads":
        return x.transpose(0, 1).to(device).contiguous().transpose(0, 1)
    if layout == "expanded":
        return x[:, :1].to(device).contiguous().expand(rows, heads, d)
    shape = (rows, heads + 1, d + 3) if layout == "slice" else (rows, heads, 2 * d)
    memory = torch.full(shape, math.nan, dtype=x.dtype, device=device)
    view = memory[:, 1:, 1 : d + 1] if layout == "slice" else memory[:, :, 1::2]
    return view.copy_(x)


def inverse(index: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """copies and offsets of an index."""
    offsets = torch.zeros(num_rows + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(index, minlength=num_rows).cumsum(0)
    return index.argsort(stable=True), offsets


def forward(implementation, key: Tensor, value: Tensor, index: Tensor, layouts=("tokens", "tokens")):
    """The gathered keys and values, on the CPU."""
    module, device = implementation
    placed = [place(x, layout, device) for x, layout in zip((key, value), layouts, strict=True)]
    made = module.gather_kv_fwd(*placed, index.to(device))
    assert all(x.is_contiguous() and x.dtype == key.dtype for x in made)
    return [x.cpu() for x in made]


def backward(implementation, grad_key, grad_value, index, num_rows, layouts=("tokens", "tokens")):
    """The gradients of keys and values, on the CPU; the same bits twice."""
    module, device = implementation
    placed = [place(x, layout, device) for x, layout in zip((grad_key, grad_value), layouts, strict=True)]
    copies, offsets = (x.to(device) for x in inverse(index, num_rows))
    made, again = (module.gather_kv_bwd(*placed, copies, offsets) for _ in range(2))
    for x, y in zip(made, again, strict=True):
        assert x.is_contiguous() and x.dtype == grad_key.dtype
        assert torch.equal(bits(x), bits(y))
    return [x.cpu() for x in made]


def bits(x: Tensor) -> Tensor:
    """For comparisons in which NaN is itself and -0.0 is not 0.0."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def scattered(grad: Tensor, index: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """The naive gradient, accumulated in this dtype."""
    return torch.zeros(num_rows, *grad.shape[1:], dtype=dtype).index_add_(0, index, grad.to(dtype))


def check_gradient(got: Tensor, grad: Tensor, index: Tensor, num_rows: int) -> None:
    """Within twice the error of the naive code with a float32 sum, and one rounding of the sum of sizes."""
    truth = scattered(grad, index, num_rows, torch.float64)
    sizes = scattered(grad.abs(), index, num_rows, torch.float64)
    accumulation = torch.float64 if grad.dtype == torch.float64 else torch.float32
    naive = scattered(grad, index, num_rows, accumulation).to(grad.dtype)
    tiny = torch.finfo(accumulation).eps * sizes + torch.finfo(grad.dtype).smallest_normal * torch.finfo(grad.dtype).eps
    wrong = ~((got.double() - truth).abs() <= 2 * (naive.double() - truth).abs() + tiny)
    assert not wrong.any(), (got[wrong], truth[wrong], naive[wrong])


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# On a GPU nearly every example compiles kernels of its own.
@draws(30 if CUDA else 40)
@given(
    num_rows=st.integers(1, 40),
    more=st.lists(st.integers(0, 39), max_size=40),  # further copies
    missing=st.booleans(),  # rows without a copy
    heads=st.integers(1, 5),
    d=st.sampled_from([1, 3, 8, 20, 64, 80, 96, 192, 300]),
    dv=st.sampled_from([1, 2, 8, 64, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    key_layout=st.sampled_from(LAYOUTS),
    value_layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**16),
)
def test_agrees_with_float64(
    implementation, num_rows, more, missing, heads, d, dv, dtype, key_layout, value_layout, seed
):
    if dtype == torch.float64 and implementation[0] is triton_kernels:
        dtype = torch.float32
    index = torch.tensor([row % num_rows for row in more] + [] if missing else list(range(num_rows)), dtype=torch.int64)
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(seed))]
    layouts = key_layout, value_layout

    def tensors(rows, seed):
        """As they are placed: of an expanded tensor every head is the first."""
        made = [drawn((rows, heads, size), dtype, seed + i) for i, size in enumerate((d, dv))]
        return [x[:, :1].expand_as(x) if lay == "expanded" else x for x, lay in zip(made, layouts, strict=True)]

    key, value = tensors(num_rows, seed)
    for got, x in zip(forward(implementation, key, value, index, layouts), (key, value), strict=True):
        assert torch.equal(bits(got), bits(x[index].contiguous()))
    grads = tensors(len(index), seed + 2)
    for got, grad in zip(backward(implementation, *grads, index, num_rows, layouts), grads, strict=True):
        check_gradient(got, grad, index, num_rows)


@pytest.mark.parametrize("shape, dtype, layout", pairwise(
    [(8, 128, 128), (5, 80, 80), (4, 192, 128), (3, 64, 64)], DTYPES[:3], LAYOUTS[:2]
), ids=str)  # fmt: skip
def test_pairs_of_a_shared_prompt(implementation, shape, dtype, layout):
    heads, d, dv = shape
    """Shapes of real models: prompts twice, completions once, and a first row in all of them."""
    prompt, completion, index = torch.arange(1, 9), torch.arange(0, 5), []
    for start in (1, 19):
        for branch in (0, 1):
            index += [torch.tensor([0]), start - 1 + prompt, start + 8 + 5 * branch + completion]
    index = torch.cat(index)
    key, value = drawn((37, heads, d), dtype, 0), drawn((37, heads, dv), dtype, 1)
    for got, x in zip(forward(implementation, key, value, index, (layout, layout)), (key, value), strict=True):
        assert torch.equal(bits(got), bits(x[index]))
    grads = drawn((len(index), heads, d), dtype, 2), drawn((len(index), heads, dv), dtype, 3)
    for got, grad in zip(backward(implementation, *grads, index, 37, (layout, layout)), grads, strict=True):
        check_gradient(got, grad, index, 37)


@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_one_copy_of_every_row_moves_them(implementation, dtype):
    index = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    grads = drawn((33, 2, 40), dtype, 0), drawn((33, 2, 24), dtype, 1)
    for got, grad in zip(backward(implementation, *grads, index, 33), grads, strict=True):
        assert torch.equal(got[index], grad)


@pytest.mark.parametrize("num_copies", [1, 2, 3, 4, 6, 7, 700])
def test_sums_run_in_the_order_of_the_copies(implementation, num_copies):
    """Bit for bit as float32 additions one after the other, of a row in the midst of rows of one copy and of none."""
    index = torch.cat([torch.arange(3), torch.full((num_copies - 1,), 2), torch.tensor([4])])
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(num_copies))]
    grad_key, grad_value = drawn((len(index), 2, 16), torch.float32, 0), drawn((len(index), 2, 8), torch.float32, 1)
    grad_key *= torch.logspace(-4, 4, len(index))[:, None, None]
    for got, grad in zip(backward(implementation, grad_key, grad_value, index, 6), (grad_key, grad_value), strict=True):
        total = torch.zeros_like(grad[0])
        for k in (index == 2).nonzero():
            total = total + grad[k[0]]
        assert torch.equal(got[2], total)
        assert torch.equal(got[4], grad[index == 4][0])
        assert not got[3].any() and not got[5].any()


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_small_addends_are_not_lost(implementation, dtype):
    """1 and 300 times half a unit of its last place: none of them would show in a sum in the dtype itself."""
    half = torch.finfo(dtype).eps / 2
    grad = torch.full((301, 1, 8), half, dtype=dtype)
    grad[0] = 1.0
    for got in backward(implementation, grad, grad, torch.zeros(301, dtype=torch.int64), 1):
        assert (got == torch.tensor(1 + 300 * half, dtype=dtype)).all()


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_ties_round_to_even(implementation, dtype):
    """The sum of two numbers of one size is a tie half of the time; to round those upwards would be a bias."""
    eps = torch.finfo(dtype).eps
    first, second = torch.tensor([1.0, 1 + eps, -1.0, -1 - eps], dtype=dtype), torch.tensor([1 + eps] * 4, dtype=dtype)
    second[2:] *= -1
    grad = torch.stack([first, second]).unsqueeze(1)
    for got in backward(implementation, grad, grad, torch.zeros(2, dtype=torch.int64), 1):
        assert got.flatten().tolist() == [2.0, 2 + 2 * eps, -2.0, -2 - 2 * eps]


def test_infinities_and_nan_stay_in_their_rows(implementation):
    grad = torch.ones(6, 1, 8)
    grad[1], grad[2], grad[5] = math.inf, math.nan, -math.inf
    for got in backward(implementation, grad, grad, torch.tensor([0, 1, 2, 3, 0, 1]), 4):
        assert got[:, 0, 0].isnan().tolist() == [False, True, True, False]
        assert got[0, 0, 0] == 2 and got[3, 0, 0] == 1


@pytest.mark.parametrize("num_rows, num_gathered", [(0, 0), (5, 0)])
def test_nothing_to_gather(implementation, num_rows, num_gathered):
    index = torch.zeros(num_gathered, dtype=torch.int64)
    made = forward(implementation, torch.ones(num_rows, 2, 8), torch.ones(num_rows, 2, 4), index)
    assert [tuple(x.shape) for x in made] == [(0, 2, 8), (0, 2, 4)]
    made = backward(implementation, *made, index, num_rows)
    assert [tuple(x.shape) for x in made] == [(num_rows, 2, 8), (num_rows, 2, 4)]
    assert not any(x.any() for x in made)


@pytest.mark.parametrize("strides", [(2**30, 64, 1), (64, 2**30, 1)], ids=["rows", "heads"])
def test_addresses_beyond_2_to_the_31(implementation, strides):
    """Rows or heads 2^30 elements apart; on a CPU the pages between them are never touched."""
    module, device = implementation
    count = 2**31 + 2**12
    if device == "cpu":
        memory = torch.frombuffer(mmap.mmap(-1, 2 * count), dtype=torch.bfloat16)
    else:
        memory = torch.empty(count, dtype=torch.bfloat16, device=device)
    x = memory.as_strided((3, 3, 64), strides)
    x.copy_(drawn((3, 3, 64), torch.bfloat16, 0))
    plain, index = x.cpu().contiguous(), torch.tensor([2, 0, 1])
    y = plain.to(device)
    for got in module.gather_kv_fwd(x, y, index.to(device)):
        assert torch.equal(got.cpu(), plain[index])
    for got in module.gather_kv_bwd(y, x, *(place.to(device) for place in inverse(index, 3))):
        assert torch.equal(got.cpu()[index], plain)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
@NO_TRITON
def test_more_than_2_to_the_31_gathered_elements():
    num_rows, num_gathered = 4096, 2**21 + 4096
    index = torch.arange(num_gathered, device="cuda") % num_rows
    key, value = torch.randn(num_rows, 8, 128, device="cuda").bfloat16(), torch.randn(num_rows, 8, 8, device="cuda")
    value = value.bfloat16()
    gathered = triton_kernels.gather_kv_fwd(key, value, index)
    for made, x in zip(gathered, (key, value), strict=True):
        assert torch.equal(made[-num_rows:], x) and torch.equal(made[:num_rows], x)
    copies, offsets = inverse(index.cpu(), num_rows)
    count = num_gathered // num_rows
    for made, x in zip(
        triton_kernels.gather_kv_bwd(*gathered, copies.cuda(), offsets.cuda()), (key, value), strict=True
    ):
        torch.testing.assert_close(made.float(), count * x.float(), rtol=2**-8, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no GPU")
@pytest.mark.parametrize("module", [eager, pytest.param(triton_kernels, marks=NO_TRITON)], ids=["eager", "triton"])
def test_neither_waits_for_the_device(module):
    index = torch.randint(50, (200,))
    copies, offsets = (x.cuda() for x in inverse(index, 50))
    key, index = torch.randn(50, 2, 64, device="cuda"), index.cuda()
    module.gather_kv_bwd(*module.gather_kv_fwd(key, key, index), copies, offsets)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        module.gather_kv_bwd(*module.gather_kv_fwd(key, key, index), copies, offsets)
    finally:
        torch.cuda.set_sync_debug_mode("default")
