"""Every loss on a GPU: the numbers of float64, and nothing that waits for the device between forward and backward."""

import pytest
import torch

import fastdpo
from fastdpo.losses import REGISTRY

NAMES = [name for name, spec in REGISTRY.items() if spec.data != "scores"]
COUNT, V, D = 6, 1031, 64  # sequences, vocabulary, hidden


def problem(data, dtype):
    """hidden, weight, labels, references, arguments; rows stand group by group."""
    generator = torch.Generator().manual_seed(0)
    sequences = 2 * COUNT if data == "answers" else COUNT
    lengths = [3 + number % 4 for number in range(sequences)]
    order = (
        [number for i in range(COUNT // 2) for number in (i, COUNT // 2 + i)] if data == "pairs" else range(sequences)
    )
    ids = torch.tensor([number for number in order for _ in range(lengths[number])])
    hidden = torch.randn(len(ids), D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * 0.2
    labels = torch.randint(V, (len(ids),), generator=generator)
    refs = -7.0 * torch.tensor(lengths).float() + torch.randn(sequences, generator=generator)
    if data == "pairs":
        rows = [lengths[i] + lengths[COUNT // 2 + i] for i in range(COUNT // 2)]
    elif data == "lists":
        rows = [sum(lengths[:2]), sum(lengths[2:])]
    else:
        rows = lengths[:COUNT]
    arguments = {"lists": {"list_sizes": (2, COUNT - 2)}, "answers": {"desirable": torch.arange(COUNT) % 2 == 0}}
    tensors = [tensor.to(dtype) for tensor in (hidden, weight, refs)]
    return (*tensors[:2], labels, tensors[2], {"sequence_ids": ids, "tokens_per_pair": rows, **arguments.get(data, {})})


def run(name, dtype, device, **options):
    spec = REGISTRY[name]
    hidden, weight, labels, refs, arguments = problem(spec.data, dtype)
    moved = {key: v.to(device) if isinstance(v, torch.Tensor) else v for key, v in arguments.items()}
    hidden, weight = (tensor.to(device).requires_grad_() for tensor in (hidden, weight))
    labels, refs = labels.to(device), refs.to(device) if spec.needs_reference else None
    if name == "exo_pair":
        options["label_smoothing"] = 0.01
    waits = torch.device(device).type == "cuda"
    if waits:
        torch.cuda.set_sync_debug_mode("error")
    try:
        out = fastdpo.linear_loss(hidden, weight, labels, refs, loss_type=name, beta=0.3, **moved, **options)
        out.loss.backward()
        metrics = out.metrics()
    finally:
        if waits:
            torch.cuda.set_sync_debug_mode("default")
    return (
        out.loss.item(),
        hidden.grad.double().cpu(),
        weight.grad.double().cpu(),
        {k: v.item() for k, v in metrics.items()},
    )


def check(name, device, **options):
    loss, *grads, metrics = run(name, torch.float32, device, memory_budget=16 * V * 4, **options)
    truth, *exact, expected = run(name, torch.float64, "cpu", memory_budget=10**9, **options)
    assert loss == pytest.approx(truth, rel=1e-4, abs=1e-5)
    for got, wanted in zip(grads, exact, strict=True):
        assert (got - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6
    assert metrics == pytest.approx(expected, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["sigmoid", "listwise", "kto"])
def test_the_check_itself_on_a_cpu(name):
    check(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_every_loss(name):
    torch.backends.cuda.matmul.allow_tf32 = False
    check(name, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"ld_alpha": 0.3}, {"use_weighting": True}, {"f_divergence_type": "js_divergence"}]
)
def test_options(options):
    torch.backends.cuda.matmul.allow_tf32 = False
    check("sigmoid", "cuda", **options)
