"""SDPA and FlexAttention against the eager equation; which backend is chosen; all of them on a GPU."""

import math
from itertools import product

import pytest
import torch
from packed_attention import HEADS, check, emulate, exact, make_inputs, needs
from tiny import random_rows, tiny_model

import fastdpo
from fastdpo.attention import BACKENDS, flash, flex, select_backend
from fastdpo.models import forward_logps
from fastdpo.packing import PreferenceCollator, pack


@pytest.fixture
def inputs():
    return make_inputs()


@pytest.mark.parametrize(
    "scale, window, softcap, sinks", list(product([None, 0.3], [None, 3], [None, 2.0], [False, True]))
)
def test_sdpa(inputs, scale, window, softcap, sinks):
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True) if sinks else None
    check(BACKENDS["sdpa"].attend, inputs, scale=scale, window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_flex(monkeypatch, inputs, window, softcap, sinks):
    """Uncompiled it runs on a CPU, forward only: its mask and its scores."""
    module = flex.flex_attention_module()
    monkeypatch.setattr(flex, "compiled_flex_attention", lambda: module.flex_attention)
    q, k, v, layout = inputs
    q, k, v = (torch.nn.functional.pad(t.detach(), (0, 8)) for t in (q, k, v))  # it wants 16 channels
    sinks = torch.randn(HEADS, dtype=torch.float64) if sinks else None
    options = {"scale": 0.3, "window": window, "softcap": softcap, "sinks": sinks}
    out = BACKENDS["flex"].attend(q, k, v, layout, **options)
    torch.testing.assert_close(out, exact(q, k, v, layout, **options), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 50, 128, 300])
def test_the_block_mask_covers_just_what_is_seen(window):
    """Whole blocks are seen whole, and in blocks that are not listed nothing is seen."""
    system = [1] * 150
    sequences = [([*system, *[2 + p] * 170], [9 + a] * (90 + 40 * a)) for p in range(2) for a in range(2)]
    layout = pack([*sequences, ([30] * 260, [31] * 5)]).layout
    mask = flex.block_mask(layout, window)
    ends, positions = layout.subtree_end, layout.positions
    i, j = torch.arange(len(ends))[:, None], torch.arange(len(ends))[None, :]
    seen = (j <= i) & (i < ends[None, :])
    if window is not None:
        seen &= positions[:, None] - positions[None, :] < window
    assert mask.seq_lengths == (len(ends), len(ends))
    blocks = -(-len(ends) // flex.BLOCK)
    padded = torch.zeros(blocks * flex.BLOCK, blocks * flex.BLOCK, dtype=torch.bool)
    padded[: len(ends), : len(ends)] = seen
    tiles = padded.view(blocks, flex.BLOCK, blocks, flex.BLOCK).transpose(1, 2)
    listed = {"part": set(), "whole": set()}
    for kind, counts, indices in (
        ("part", mask.kv_num_blocks, mask.kv_indices),
        ("whole", mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        for row in range(blocks):
            listed[kind] |= {(row, int(key)) for key in indices[0, 0, row, : counts[0, 0, row]]}
    assert not listed["part"] & listed["whole"]
    for row, key in product(range(blocks), range(blocks)):
        if (row, key) in listed["whole"]:
            assert tiles[row, key].all()
        elif (row, key) not in listed["part"]:
            assert not tiles[row, key].any()
    assert bool(listed["whole"]) == (window is None or window > flex.BLOCK)
    assert len(listed["part"] | listed["whole"]) < blocks * (blocks + 1) // 2
    assert torch.equal(mask.mask_mod(None, None, i, j), seen)


def test_dropout_is_drawn_and_scaled(inputs):
    q, k, v, layout = inputs
    ones = torch.ones_like(v)
    for softcap in (None, 50.0):
        torch.manual_seed(0)
        draws = [BACKENDS["sdpa"].attend(q, k, ones, layout, scale=None, softcap=softcap, dropout=0.5).detach()
                 for _ in range(200)]  # fmt: skip
        mean = torch.stack(draws).mean()
        assert draws[0].std() > 0.1 and abs(mean - 1) < 0.05


def compiled_layers(model, **options):
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, backend="aot_eager", **options)


@pytest.mark.slow
def test_compiled_layers_are_compiled_once_for_all_lengths():
    from torch._dynamo.utils import counters

    model, rows = tiny_model(), random_rows(15, seed=3)
    batches = [PreferenceCollator()(rows[i : i + 3]) for i in range(0, 15, 3)]
    assert len({batch.num_tokens for batch in batches}) == 5
    plain = [fastdpo.sequence_logps(model, batch).detach() for batch in batches]
    torch._dynamo.reset()
    counters.clear()
    compiled_layers(model)
    graphs = []
    for batch, expected in zip(batches, plain, strict=True):
        out = fastdpo.sequence_logps(model, batch)
        out.sum().backward()
        torch.testing.assert_close(out, expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] < graphs[1] == graphs[-1]  # the second length makes the graphs dynamic


@pytest.mark.slow
def test_compiled_layers_call_a_kernel_without_a_graph_break(monkeypatch):
    """A stand-in of varlen_attn's signature that can be traced, as the kernel's operator can."""

    def traceable(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1),
                  enable_gqa=False):  # fmt: skip
        return query * scale + key.mean() * value.mean() * max_k + cu_seq_k[-1]

    monkeypatch.setattr(flash, "_installed", {"flash_attn": (), "torch_varlen": (flash.described(traceable, 0, 8),)})
    monkeypatch.setattr(flash, "_misses", lambda kernel, needs: None)
    from torch._dynamo.utils import counters

    model, rows = tiny_model(), random_rows(9, seed=3)
    torch._dynamo.reset()
    counters.clear()
    compiled_layers(model, fullgraph=True)
    for i in (0, 3, 6):
        forward_logps(model, PreferenceCollator()(rows[i : i + 3]), attention_backend="torch_varlen")  # no true kernel
    assert counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]


@pytest.mark.parametrize(
    "wanted, chosen",
    [
        (needs("cpu", torch.float32), "sdpa"),
        (needs("cpu", torch.bfloat16, softcap=True), "sdpa"),
        (needs(), "flash_attn"),
        (needs(window=True), "flash_attn"),
        (needs(softcap=True), "flash_attn"),
        (needs(dropout=True), "flash_attn"),
        (needs(sinks=True), "flex"),
        (needs(dtype=torch.float32), "sdpa"),
        (needs(dtype=torch.float32, softcap=True), "flex"),
        (needs(dtype=torch.float64, softcap=True), "sdpa"),
        (needs(head_dim=512), "sdpa"),
        (needs(sinks=True, dropout=True), "sdpa"),
        (needs(softcap=True, dropout=True), "sdpa"),
        (needs(head_dim=8, value_head_dim=8), "flash_attn"),
        (needs(head_dim=8, sinks=True), "sdpa"),
        (needs(head_dim=8, dtype=torch.float32, softcap=True), "sdpa"),
        (needs(value_head_dim=8, sinks=True), "sdpa"),
        (needs(head_dim=16, value_head_dim=16, sinks=True), "flex"),
    ],
)
def test_automatic_choice(monkeypatch, wanted, chosen):
    emulate(monkeypatch, "flash-attn 2")
    assert select_backend("auto", wanted).name == chosen


def test_automatic_choice_without_flash_attn(monkeypatch):
    emulate(monkeypatch, "torch 2.11")
    assert select_backend("auto", needs(window=True)).name == "torch_varlen"
    assert select_backend("auto", needs(softcap=True)).name == "flex"
    assert select_backend("auto", needs(dropout=True)).name == "sdpa"
    emulate(monkeypatch, "torch 2.11 on Turing")
    assert select_backend("auto", needs(dtype=torch.float16)).name == "sdpa"
    emulate(monkeypatch)
    assert select_backend("auto", needs()).name == "sdpa"


@pytest.mark.parametrize(
    "name, wanted, message",
    [
        ("flash_attn", needs("cpu"), "'flash_attn' runs on GPUs only, and the model is on cpu; or choose 'auto'"),
        ("flex", needs(dropout=True), "'flex' has no dropout"),
        ("flex", needs("cpu"), "runs on GPUs only"),
        ("flex", needs(head_dim=8), "'flex' takes heads of at least 16 channels, and these have 8"),
        ("flex", needs(value_head_dim=12), "'flex' takes heads of at least 16 channels, and these have 12"),
        ("torch_varlen", needs(), "is not there; it comes with torch 2.11"),
        ("xformers", needs(), "unknown; known are: auto, flash_attn, torch_varlen, flex, sdpa"),
    ],
)
def test_a_backend_asked_for_by_name_serves_or_raises(monkeypatch, name, wanted, message):
    emulate(monkeypatch, "flash-attn 2")
    with pytest.raises(ValueError, match=message):
        select_backend(name, wanted)


def test_what_to_install(monkeypatch):
    emulate(monkeypatch)
    with pytest.raises(
        ValueError, match=r"is not there; pip install --no-build-isolation \"fastdpo\[flash\]\", or flash"
    ):
        select_backend("flash_attn", needs())


USUAL = ((64, 64), (4, 2))
GPU_CASES = [  # name, feature, window, channels of queries and of values, heads of queries and of keys
    *((*case, *USUAL) for case in product(["flash_attn", "torch_varlen"], ["plain"], [None, 40])),
    *((*case, *USUAL) for case in product(["flash_attn", "flex"], ["softcap", "sinks"], [None, 40])),
    *((*case, *USUAL) for case in product(["flash_attn", "flex"], ["sinks in float32"], [40])),
    ("flex", "plain", 40, *USUAL),
    ("flash_attn", "sinks", None, (8, 8), (8, 2)),
    *product(
        ["flash_attn", "torch_varlen"], ["plain"], [None],
        [(8, 8), (20, 12), (128, 128), (192, 128)], [(8, 2), (3, 3)],
    ),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name, feature, window, channels, heads", GPU_CASES)
def test_kernels_on_a_gpu_against_the_equation(monkeypatch, name, feature, window, channels, heads):
    """Grouped heads, segments whose queries are fewer than their keys, forward and backward."""
    wanted = needs(
        head_dim=channels[0], value_head_dim=channels[1], softcap=feature == "softcap", sinks="sinks" in feature,
        window=window is not None,
    )  # fmt: skip
    if (why_not := BACKENDS[name].lacks(wanted)) is not None:
        pytest.skip(f"{name} {why_not}")
    if name == "flex":
        torch._dynamo.reset()  # it compiles so many kinds of a function and no more
    system = [1] * 70
    sequences = [([*system, *[2 + p] * 60], [9 + a] * (30 + 20 * a)) for p in range(2) for a in range(2)]
    q, k, v, layout = make_inputs(
        channels[1], "cuda", torch.bfloat16, channels[0], [*sequences, ([30] * 20, [31] * 130)], *heads
    )
    options = {"scale": None, "window": window}
    options |= {"softcap": 5.0} if feature == "softcap" else {}
    sinks = [torch.randn(heads[0], device="cuda", dtype=torch.bfloat16)] if "sinks" in feature else []

    def run(attend, dtype):
        copies = [t.detach().to(dtype).requires_grad_() for t in (q, k, v, *sinks)]
        if "float32" in feature and dtype == torch.bfloat16:
            copies[3] = copies[3].detach().float().requires_grad_()
        extra = {"sinks": copies[3]} if sinks else {}
        out = attend(*copies[:3], layout, **options, **extra)
        torch.manual_seed(1)
        return [out, *torch.autograd.grad(out, copies, torch.randn_like(out, dtype=torch.float32).to(dtype))]

    truth = run(exact, torch.float64)
    naive = run(BACKENDS["sdpa"].attend, torch.bfloat16)
    shapes = []
    if name != "flex":
        monkeypatch.setattr(flash, "_installed", {name: tuple(recording(k, shapes) for k in flash.installed(name))})
    ours = run(BACKENDS[name].attend, torch.bfloat16)
    assert shapes == ([] if name == "flex" else [heads[1]])
    for a, n, e in zip(ours, naive, truth, strict=True):
        ours_error, naive_error = ((x.double() - e).abs().max() for x in (a, n))
        assert ours_error <= 2 * naive_error + 1e-3
        assert math.isfinite(ours_error)


def recording(kernel, shapes):
    """The kernel, which notes how many heads of keys it is given: no copies for the queries that share them."""

    def function(query, key, *args, **options):
        shapes.append(key.shape[1])
        return kernel.function(query, key, *args, **options)

    return kernel._replace(function=function)
