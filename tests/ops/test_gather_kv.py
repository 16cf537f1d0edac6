"""gather_kv: what the autograd layer adds to the kernels."""

import shutil

import pytest
import torch
from graphs import replayed
from tiny import device_for

from fastdpo.ops import gather_kv

IMPLS = ["eager", "triton"]
T, K, H, D, DV = 6, 11, 2, 8, 4
INDEX = torch.tensor([0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 5])


def inverse(index, num_rows):
    offsets = torch.zeros(num_rows + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(index, minlength=num_rows).cumsum(0)
    return index.argsort(stable=True), offsets


def tensors(dtype=torch.float32, device="cpu", needs=(True, True)):
    """Keys as attention gets them, values as a projection writes them."""
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(1, H, T, D, generator=generator).to(device, dtype)[0].transpose(0, 1)
    value = torch.randn(T, H, DV, generator=generator).to(device, dtype)
    return [x.detach().requires_grad_(needed) for x, needed in zip((key, value), needs, strict=True)]


def places(device="cpu", index=INDEX, num_rows=T):
    return [x.to(device) for x in (index, *inverse(index, num_rows))]


def loss_of(gathered):
    """Depends on every element in another way."""
    return sum((x.double() * torch.arange(1, x.numel() + 1, device=x.device).view(x.shape)).sum() for x in gathered)


@pytest.mark.parametrize("impl", [*IMPLS, "auto"])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_equals_index_select(impl, needs):
    device = device_for(impl)
    key, value = tensors(device=device, needs=needs)
    index, copies, offsets = places(device)
    ours = gather_kv(key, value, index, copies, offsets, impl=impl)
    theirs = key.index_select(0, index), value.index_select(0, index)
    for got, expected, needed in zip(ours, theirs, needs, strict=True):
        assert torch.equal(got, expected) and got.requires_grad == needed
    needed = [x for x in (key, value) if x.requires_grad]
    if needed:
        grads = [torch.autograd.grad(loss_of(gathered), needed) for gathered in (ours, theirs)]
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_output_alone_has_a_gradient(impl):
    device = device_for(impl)
    key, value = tensors(device=device)
    gathered, _ = gather_kv(key, value, *places(device), impl=impl)
    got = torch.autograd.grad(gathered.sum(), [key, value], allow_unused=True)
    counts = torch.bincount(INDEX).to(device)
    assert torch.equal(got[0], counts[:, None, None].expand(T, H, D).float())
    assert got[1] is None or not got[1].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_narrow_integers(impl, dtype):
    """A gradient of 256 + 1 + 1 in bfloat16 is 258 by way of float32, and 256 without."""
    device = device_for(impl)
    key, value = tensors(dtype, device)
    index, copies, offsets = (x.int() for x in places(device))
    gathered = gather_kv(key, value, index, copies, offsets, impl=impl)
    assert all(x.dtype == dtype for x in gathered)
    ups = [torch.ones_like(x) for x in gathered]
    for up in ups:
        up[0] = 256
    for got in torch.autograd.grad(gathered, [key, value], ups):
        assert got.dtype == dtype and got[:, 0, 0].tolist() == [258, 3, 2, 1, 1, 1]


def test_float64_gradcheck():
    key, value = tensors(torch.float64)
    assert torch.autograd.gradcheck(lambda k, v: gather_kv(k, v, *places()), (key, value))


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, False)], ids=str)
def test_is_a_well_made_operator(needs):
    key, value = tensors(needs=needs)
    index, copies, offsets = places()
    torch.library.opcheck(torch.ops.fastdpo.gather_kv, (key, value, index, copies, offsets, "eager"))
    gradients = torch.randn(K, H, D), torch.randn(H, K, DV).transpose(0, 1)
    torch.library.opcheck(torch.ops.fastdpo.gather_kv_backward, (*gradients, copies, offsets, "eager"))


def step(key, value, index, copies, offsets):
    """Something to fuse before and after the gather."""
    gathered_key, gathered_value = gather_kv(key * 2, value.sin(), index, copies, offsets)
    return (gathered_key[..., :DV] * gathered_value).sum(-1).exp().sum() + gathered_key.square().sum()


def values(function, key, value, *others):
    leaves = [x for x in (key, value) if x.requires_grad]
    out = function(key, value, *others)
    return [out.detach(), *torch.autograd.grad(out, leaves)]


@pytest.mark.parametrize("needs", [(True, True), (False, True)], ids=str)
def test_compiles_without_a_graph_break(needs):
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    arguments = *tensors(needs=needs), *places()
    for got, expected in zip(values(compiled, *arguments), values(step, *arguments), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_compiles_with_inductor(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    arguments = *tensors(), *places()
    compiled = torch.compile(step, fullgraph=True)
    for got, expected in zip(values(compiled, *arguments), values(step, *arguments), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_one_graph_serves_all_lengths():
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=counting, fullgraph=True, dynamic=True)
    for num_rows, num_gathered in ((5, 9), (20, 20), (33, 70)):
        index = torch.cat([torch.arange(num_rows), torch.randint(num_rows, (num_gathered - num_rows,))])
        key, value = torch.randn(num_rows, H, D, requires_grad=True), torch.randn(num_rows, H, DV, requires_grad=True)
        arguments = key, value, *places(index=index, num_rows=num_rows)
        for got, expected in zip(values(compiled, *arguments), values(step, *arguments), strict=True):
            torch.testing.assert_close(got, expected)
    assert len(compilations) == 1


@pytest.mark.parametrize("impl", IMPLS)
def test_under_autocast_and_checkpointing(impl):
    device = device_for(impl)
    weight = torch.randn(D, D, generator=torch.Generator().manual_seed(1)).to(device)

    def inner(key, value):
        gathered_key, gathered_value = gather_kv(key @ weight, value.bfloat16(), *places(device), impl=impl)
        assert gathered_key.dtype == gathered_value.dtype == torch.bfloat16
        return gathered_key.float().square().sum() + gathered_value.float().square().sum()

    def checkpointed(key, value):
        return torch.utils.checkpoint.checkpoint(inner, key, value, use_reentrant=False)

    with torch.autocast(device, torch.bfloat16):
        plain, again = (values(function, *tensors(device=device)) for function in (inner, checkpointed))
    for got, expected in zip(again, plain, strict=True):
        assert torch.equal(got, expected)


def test_a_second_derivative_raises():
    key, value = tensors()
    gathered, _ = gather_kv(key, value, *places())
    (grad,) = torch.autograd.grad(gathered.square().sum(), key, create_graph=True)
    with pytest.raises(RuntimeError, match="gather_kv has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("num_rows", [0, 3])
def test_nothing_gathered_is_connected(impl, num_rows):
    device = device_for(impl)
    key = torch.ones(num_rows, H, D, device=device, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int64)
    gathered = gather_kv(key, key, *places(device, empty, num_rows), impl=impl)
    assert [x.shape for x in gathered] == [(0, H, D)] * 2 and all(x.requires_grad for x in gathered)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in gathered), key)
    assert grad.shape == key.shape and not grad.any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"key": torch.zeros(T, H, D, dtype=torch.int64)}, "key is torch.int64"),
        ({"key": torch.zeros(T, D)}, r"key has shape \(6, 8\); it must be \(T, H, d\)"),
        ({"key": torch.zeros(T, 0, D)}, r"key has shape \(6, 0, 8\)"),
        ({"key": torch.zeros(T, H, D).bfloat16()}, "value is torch.float32 and key torch.bfloat16"),
        ({"value": None}, "value is NoneType"),
        ({"value": torch.zeros(T, H + 1, DV)}, r"value has shape \(6, 3, 4\).* \(6, 2, dv\)"),
        ({"value": torch.zeros(T, H, 0)}, r"value has shape \(6, 2, 0\)"),
        ({"value": torch.zeros(T, H, DV, device="meta")}, "value is on meta and key on cpu"),
        ({"index": INDEX.float()}, "index is torch.float32"),
        ({"index": INDEX[None]}, r"index has shape \(1, 11\)"),
        ({"copies": INDEX[1:]}, r"copies has shape \(10,\); index has 11 entries"),
        ({"copies": INDEX.to("meta")}, "copies is on meta and key on cpu"),
        ({"offsets": torch.arange(T)}, r"offsets has shape \(6,\); the 6 rows of key need \(7,\)"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
        ({"key": torch.zeros(T, H, D).double(), "value": torch.zeros(T, H, DV).double(), "impl": "triton"}, "float64"),
    ],
)
def test_bad_arguments(change, message):
    index, copies, offsets = places()
    arguments = {"key": torch.zeros(T, H, D), "value": torch.zeros(T, H, DV), "index": index, "copies": copies}
    with pytest.raises(ValueError, match=message):
        gather_kv(**(arguments | {"offsets": offsets} | change))


def test_triton_without_gpu_or_interpreter_says_what_to_do(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs a GPU"):
        gather_kv(torch.zeros(T, H, D), torch.zeros(T, H, DV), *places(), impl="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", IMPLS)
def test_in_a_cuda_graph(impl):
    """Captured once, replayed on other numbers."""
    key, value = tensors(device="cuda")
    arguments = places("cuda")

    def run():
        gathered = gather_kv(key, value, *arguments, impl=impl)
        return [*(x.detach() for x in gathered), *torch.autograd.grad(loss_of(gathered), [key, value])]

    captured, expected = replayed(run, [key])
    for got, wanted in zip(captured, expected, strict=True):
        assert torch.equal(got, wanted)
