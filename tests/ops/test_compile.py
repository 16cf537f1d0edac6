"""The operators under torch.library's own checks, torch.compile without graph breaks, and CUDA graphs."""

import pytest
import torch
from graphs import replayed
from tiny import device_for

import fastdpo
import fastdpo.ops  # defines the operators

V, D, N = 50, 16, 32
OPTIONS = (-100, 0.7, 3.0, 1.5)


def opcheck(operator, arguments):
    """Schema, fake kernel, autograd registration and AOT dispatch, static and dynamic; raises where one fails."""
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_token_logps_is_a_well_made_operator(stats, inplace):
    logits = torch.randn(3, 7, V, requires_grad=True)
    labels = torch.randint(V, (3, 7))
    # opcheck uses its inputs several times, so what is written over must be no leaf of theirs.
    if not inplace:
        opcheck(torch.ops.fastdpo.token_logps, (logits, labels, *OPTIONS, stats, inplace, "eager"))
    norms = torch.randn(2, 3, 7)
    arguments = (torch.randn(3, 7), logits.detach(), labels, norms, *OPTIONS, "eager")
    opcheck(torch.ops.fastdpo.token_logps_backward_ if inplace else torch.ops.fastdpo.token_logps_backward, arguments)


@pytest.mark.parametrize("needs", [(False,) * 3, (True, False, False), (True, True, True)], ids=str)
@pytest.mark.parametrize("kept, v", [(0, V), (5, V), (5, 1025)])  # rows of 1025 logits stand further apart
def test_linear_token_logps_is_a_well_made_operator(needs, kept, v):
    hidden, weight, bias = torch.randn(N, D), torch.randn(v, D), torch.randn(v)
    for tensor, needed in zip((hidden, weight, bias), needs, strict=True):
        tensor.requires_grad_(needed)
    labels = torch.randint(v, (N,))
    kept = kept if needs[1] else 0
    opcheck(
        torch.ops.fastdpo.linear_token_logps, (hidden, weight, bias, labels, *OPTIONS, True, *needs, 7, kept, "eager")
    )
    arguments = (torch.randn(N), hidden.detach(), weight.detach(), bias.detach(), labels, torch.randn(2, N),
                 torch.randn(kept, v), *OPTIONS, *needs, 7, "eager")  # fmt: skip
    opcheck(torch.ops.fastdpo.linear_token_logps_backward, arguments)


def functions():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (N,), generator=generator)
    labels[3] = -100
    hidden, weight = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    refs, ids = torch.randn(4, generator=generator), torch.tensor([0, 2, 1, 3]).repeat_interleave(N // 4)
    padded_labels = torch.randint(V, (4, 9), generator=generator)
    padded_labels[:, :3] = -100
    small = 7 * V * 4
    packed = {"sequence_ids": ids, "tokens_per_pair": [N // 2] * 2}
    logits = hidden @ weight.T

    def every_metric(output):
        return output.loss + sum(value.sum() for value in output.metrics().values())

    return {
        "token_logps": (lambda x: fastdpo.token_logps(x * 2, labels, softcap=3.0).sum(), [logits]),
        "in place": (lambda x: fastdpo.token_logps(x * 2, labels, inplace_backward=True).sum(), [logits]),
        "linear, all kept": (lambda h, w: fastdpo.linear_token_logps(h, w, labels).sum(), [hidden, weight]),
        "linear, tiles": (
            lambda h, w: fastdpo.linear_token_logps(h, w, labels, memory_budget=small).sum(), [hidden, weight]
        ),
        "linear, frozen": (
            lambda h: fastdpo.linear_token_logps(h, weight, labels, memory_budget=small).sum(), [hidden]
        ),
        "linear, no gradient": (lambda: fastdpo.linear_token_logps(hidden, weight, labels), []),
        "loss, packed": (lambda x: every_metric(fastdpo.loss(x, labels, refs, sequence_ids=ids)), [logits]),
        "loss, padded": (
            lambda x: fastdpo.loss(x, padded_labels, refs, label_smoothing=0.1).loss,
            [torch.randn(4, 9, V, generator=generator)],
        ),
        "linear_loss, packed": (
            lambda h, w: every_metric(fastdpo.linear_loss(h, w, labels, refs, **packed)), [hidden, weight]
        ),
        "linear_loss, tiles": (
            lambda h, w: fastdpo.linear_loss(h, w, labels, refs, memory_budget=small, **packed).loss, [hidden, weight]
        ),
        "linear_loss, padded": (
            lambda h, w: fastdpo.linear_loss(h, w, padded_labels, refs, memory_budget=small, loss_type="ipo").loss,
            [torch.randn(4, 9, D, generator=generator), weight],
        ),
    }  # fmt: skip


def values(function, tensors):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = function(*leaves)
    return [out.detach(), *(torch.autograd.grad(out, leaves) if leaves else [])]


@pytest.mark.parametrize("name", list(functions()))
def test_compiles_without_a_graph_break(name):
    function, tensors = functions()[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, expected in zip(values(compiled, tensors), values(function, tensors), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["token_logps", "in place", "linear_loss, packed"])
def test_compiles_with_inductor(name, monkeypatch, tmp_path):
    """Its passes over the graph, its order and its reuse of memory; what is not ours stays with PyTorch, for a C++
    compiler takes seconds for each kernel."""
    from torch._inductor import config

    # A graph kept from another version of the operators would be used unseen.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    function, tensors = functions()[name]
    torch._dynamo.reset()
    with config.patch(fallback_by_default=True):
        compiled = torch.compile(function, fullgraph=True)
        for got, expected in zip(values(compiled, tensors), values(function, tensors), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_one_graph_serves_every_number_of_tokens():
    weight = torch.randn(V, D, requires_grad=True)
    compilations = []

    def counting(graph, inputs):
        compilations.append(graph)
        return graph.forward

    def function(hidden, labels):
        rows = fastdpo.token_logps(hidden @ weight.T, labels)
        return (rows + fastdpo.linear_token_logps(hidden, weight, labels, memory_budget=4 * V * 4)).sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=counting, fullgraph=True, dynamic=True)
    for n in (20, 33, 47):
        hidden, labels = torch.randn(n, D), torch.randint(V, (n,))
        torch.testing.assert_close(compiled(hidden, labels), function(hidden, labels), rtol=1e-5, atol=1e-4)
    assert len(compilations) == 1


def test_under_autocast_and_checkpointing_when_compiled():
    hidden, weight, labels = torch.randn(N, D), torch.randn(V, D), torch.randint(V, (N,))

    def inner(h, w):
        return fastdpo.linear_token_logps(h, w, labels).sum() + fastdpo.token_logps(h @ w.T, labels).sum()

    def function(h, w):
        with torch.autocast("cpu", torch.bfloat16):
            return torch.utils.checkpoint.checkpoint(inner, h, w, use_reentrant=False)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for got, expected in zip(values(compiled, [hidden, weight]), values(function, [hidden, weight]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "eager"])
def test_in_a_cuda_graph(impl):
    """Captured once, replayed on other numbers."""
    device = device_for(impl) if impl == "triton" else "cuda"
    hidden = torch.randn(N, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    labels, refs = torch.randint(V, (N,), device=device), torch.randn(4, device=device)
    ids = torch.tensor([0, 2, 1, 3], device=device).repeat_interleave(N // 4)

    def step():
        options = {"sequence_ids": ids, "tokens_per_pair": [N // 2] * 2, "impl": impl}
        fused = fastdpo.linear_loss(hidden, weight, labels, refs, memory_budget=(N // 2) * V * 4, **options).loss
        kept = fastdpo.linear_loss(hidden, weight, labels, refs, memory_budget=1 << 24, **options).loss
        logits = hidden @ weight.T
        plain = fastdpo.loss(logits, labels, refs, sequence_ids=ids, impl=impl).loss
        logps = fastdpo.token_logps(logits, labels, impl=impl)
        of_head = fastdpo.linear_token_logps(hidden, weight, labels, memory_budget=(N // 2) * V * 4, impl=impl)
        total = fused + kept + plain + (logps * of_head).mean()
        return [total.detach(), logps.detach(), *torch.autograd.grad(total, [hidden, weight])]

    captured, expected = replayed(step, [hidden, weight, refs, labels])
    for got, wanted in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def functional_losses():
    """By name: a function of tensors and two numbers, and the tensors for n (pairs, lists, answers), the first of which
    is differentiated."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, D, generator=generator)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def packed(n):
        labels = torch.randint(V, (8 * n,), generator=generator)
        labels[3] = -100
        return draw(8 * n, D), labels, draw(2 * n), torch.arange(8 * n) // 4

    def padded(n):
        labels = torch.randint(V, (2 * n, 9 + n), generator=generator)
        labels[:, :3] = -100
        return draw(2 * n, 9 + n, D), labels, draw(2 * n)

    def pairs(n):
        return draw(5, n).abs().unbind(0)

    linear = fastdpo.linear_loss
    return {
        "preference_loss": (lambda c, r, p, q, _, b, e: fastdpo.preference_loss(c, r, p, q, beta=b,
                                                                                label_smoothing=e).loss, pairs),
        "divergence, mix": (
            lambda c, r, p, q, length, b, e: fastdpo.preference_loss(
                c, r, p, q, loss_type=["sigmoid", "exo_pair", "sft"], loss_weights=[1.0, b, e], chosen_lengths=length,
                rejected_lengths=length, label_smoothing=0.1 + e).loss, pairs),
        "alpha_divergence": (
            lambda c, r, p, q, _, b, e: fastdpo.preference_loss(
                c, r, p, q, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=b).loss, pairs),
        "listwise_loss": (lambda c, r, b, e: fastdpo.listwise_loss(c, r, beta=b).loss,
                          lambda n: draw(2, n, 3).unbind(0)),
        "unpaired_loss": (lambda c, r, d, b, e: fastdpo.unpaired_loss(c, r, desirable=d > 0, kl=e, beta=b).loss,
                          lambda n: draw(3, n).unbind(0)),
        "loss, packed": (lambda h, labels, refs, ids, b, e: fastdpo.loss(
            h @ weight.T, labels, refs, sequence_ids=ids, beta=b, ld_alpha=e, temperature=1 + e, softcap=9 + b
        ).loss, packed),
        "loss, padded": (lambda h, labels, refs, b, e: fastdpo.loss(h @ weight.T, labels, refs, beta=b).loss, padded),
        "linear_loss, packed": (lambda h, labels, refs, ids, b, e: linear(
            h, weight, labels, refs, sequence_ids=ids, beta=b, label_smoothing=e, use_weighting=True).loss, packed),
        "linear_loss, padded": (lambda h, labels, refs, b, e: linear(
            h, weight, labels, refs, beta=b, mean_chosen_length=3 + e, loss_type="cpo", cpo_alpha=b).loss, padded),
        "token_logps": (lambda h, labels, refs, ids, b, e: fastdpo.token_logps(
            h @ weight.T, labels, temperature=b, softcap=3 + e).sum(), packed),
        "linear_token_logps": (lambda h, labels, refs, ids, b, e: fastdpo.linear_token_logps(
            h, weight, labels, temperature=b, logit_scale=1 + e).sum(), packed),
    }  # fmt: skip


# Through AOT where there are operators of ours with fake kernels and gradients; else Dynamo's graph is what may break.
OPERATORS = ("linear_loss, packed", "linear_loss, padded", "token_logps", "linear_token_logps")


@pytest.mark.parametrize("name, dynamic", [(name, True) for name in functional_losses()] + [
    ("preference_loss", None), ("linear_loss, padded", None)])  # fmt: skip
def test_shapes_and_numbers_may_change_from_call_to_call(name, dynamic):
    """A number that has changed once is one that the graph leaves open, and so is a dimension."""
    function, make = functional_losses()[name]
    torch._dynamo.reset()
    backend = "aot_eager" if name in OPERATORS else "eager"
    compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)
    for n, beta, share in [(2, 0.1, 0.0), (3, 0.2, 0.1), (5, 0.35, 0.2)][1 if dynamic else 0 :]:
        tensors = make(n)

        def run(called, tensors=tensors, numbers=(beta, share)):
            leaf = tensors[0].clone().requires_grad_()
            out = called(leaf, *tensors[1:], *numbers)
            return [out, *torch.autograd.grad(out, leaf)]

        for got, expected in zip(run(compiled), run(function), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_numbers_out_of_range_are_refused_when_compiled_as_well():
    torch._dynamo.reset()
    compiled = torch.compile(lambda c, b: fastdpo.preference_loss(c, 0 * c, c, c, beta=b).loss, backend="eager",
                             dynamic=True)  # fmt: skip
    compiled(torch.randn(3), 0.1)
    with pytest.raises(ValueError, match=r"beta is -0\.2"):
        compiled(torch.randn(3), -0.2)
    assert torch.isfinite(compiled(torch.randn(3), 0.3))
