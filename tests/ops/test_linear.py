"""linear_token_logps against float64, in each of its ways, and what it costs."""

import pytest
import torch
from oracle import linear_token_logprobs
from tiny import device_for
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastdpo

IMPLS = ["eager", "triton"]


def draw(n=37, d=16, v=131, dtype=torch.float32, bias=False, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=generator).to(dtype)
    weight = (0.5 * torch.randn(v, d, generator=generator)).to(dtype)
    labels = torch.randint(v, (n,), generator=generator)
    labels[::5] = -100
    offset = torch.randn(v, generator=generator).to(dtype) if bias else None
    grad = torch.randn(n, generator=generator)
    offset = None if offset is None else offset.to(device)
    return hidden.to(device), weight.to(device), labels.to(device), offset, grad.to(device)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trained", ["both", "hidden", "weight", "none"])
@pytest.mark.parametrize("rows_a_tile", [1, 7, 1000])
@pytest.mark.parametrize(
    "options",
    [{}, {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3}, {"bias": True}],
    ids=["plain", "z", "bias"],
)
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


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_logits_of_all_tokens_never_exist():
    n, d, v = 600, 8, 2000
    hidden, weight, labels, _, _ = draw(n=n, d=d, v=v)
    hidden.requires_grad_()
    weight.requires_grad_()
    ids = torch.arange(n).remainder(8).sort().values
    order = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    with LargestTensor() as largest:
        fastdpo.linear_token_logps(hidden, weight, labels, memory_budget=100 * v * 4).sum().backward()
        fastdpo.linear_loss(
            hidden, weight, labels, torch.zeros(8), sequence_ids=order[ids], memory_budget=200 * v * 4
        ).loss.backward()
    assert largest.numel <= 200 * v


def test_default_budget_is_a_tile_not_all_logits():
    from fastdpo.ops.linear_logps import tile_rows

    assert tile_rows(torch.empty(49152, 1), torch.float32, None) == (1 << 26) // (49152 * 4)


@pytest.mark.parametrize(
    "trained, products", [("none", 2), ("hidden", 4), ("both", 8)], ids=["no grad", "frozen head", "trainable"]
)
def test_flops(trained, products):
    n, d, v = 64, 32, 512
    hidden, weight, labels, _, _ = draw(n=n, d=d, v=v)
    hidden.requires_grad_(trained != "none")
    weight.requires_grad_(trained == "both")
    with FlopCounterMode(display=False) as counter:
        out = fastdpo.linear_token_logps(hidden, weight, labels, memory_budget=16 * v * 4)
        if trained != "none":
            out.sum().backward()
    assert counter.get_total_flops() == products * n * d * v


@pytest.mark.parametrize("trainable, products", [(True, 6), (False, 4)])
def test_fused_loss_flops(trainable, products):
    n, d, v = 64, 32, 512
    hidden, weight, labels, _, _ = draw(n=n, d=d, v=v)
    hidden.requires_grad_()
    weight.requires_grad_(trainable)
    ids = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]).repeat_interleave(8)
    with FlopCounterMode(display=False) as counter:
        fastdpo.linear_loss(
            hidden, weight, labels, torch.zeros(8), sequence_ids=ids, tokens_per_pair=[16] * 4, memory_budget=16 * v * 4
        ).loss.backward()
    assert counter.get_total_flops() == products * n * d * v


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "hidden has shape"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.long)}, "hidden is torch.int64"),
        ({"weight": torch.zeros(5, 3)}, "weight has shape"),
        ({"labels": torch.zeros(2, dtype=torch.long)}, "labels has shape"),
        ({"labels": torch.zeros(3)}, "labels is torch.float32"),
        ({"bias": torch.zeros(4)}, "bias has shape"),
        ({"memory_budget": -1}, "memory_budget is -1"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"softcap": -2.0}, "softcap is -2.0"),
        ({"impl": "cuda"}, "impl is 'cuda'"),
    ],
)
def test_bad_arguments(change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(5, 4), "labels": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(ValueError, match=message):
        fastdpo.linear_token_logps(**(arguments | change))
