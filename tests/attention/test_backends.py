"""Every backend against the eager equation; GPU kernels' contracts through an emulation; which backend is chosen."""

import math
from itertools import pairwise, product

import pytest
import torch
from tiny import naive_sequence_logps, random_rows, tiny_model

import fastdpo
from fastdpo.attention import BACKENDS, Needs, flash, flex, select_backend
from fastdpo.models import forward_logps
from fastdpo.packing import PreferenceCollator, pack

SEQUENCES = [([1] * 5, [2] * 3), ([1] * 5, [3] * 4), ([1] * 5, [4]), ([5] * 2, [6] * 2), ([7] * 9, [8])]
HEADS, KV_HEADS, CHANNELS = 4, 2, 8


def exact(q, k, v, layout, *, scale=None, window=None, softcap=None, sinks=None):
    """The equation of `Backend`, row by row over the tree's own definition: row i sees j <= i < subtree_end[j]."""
    ends, positions = layout.subtree_end.tolist(), layout.positions.tolist()
    heads = q.shape[1] // k.shape[1]
    out = []
    for i in range(len(q)):
        seen = [j for j in range(i + 1) if i < ends[j] and (window is None or positions[i] - positions[j] < window)]
        scores = torch.einsum("hd,khd->hk", q[i], k[seen].repeat_interleave(heads, 1)) * (scale or q.shape[-1] ** -0.5)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None]], 1)
        weights = torch.softmax(scores, 1)[:, : len(seen)]
        out.append(torch.einsum("hk,khd->hd", weights, v[seen].repeat_interleave(heads, 1)))
    return torch.stack(out)


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, left, softcap=None):
    """softmax(scale q k.T) v segment by segment, causal from the bottom right, from the documented meaning alone.

    q (T, H, d), k and v (K, H_kv, d); `left`: how many keys before its own a query sees, -1 for all.
    """
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    heads = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        for i in range(q0, q1):
            own = int(k0 + (k1 - k0) - (q1 - q0) + (i - q0))
            first = int(k0) if left < 0 else max(int(k0), own - left)
            for head in range(q.shape[1]):
                scores = k[first : own + 1, head // heads] @ q[i, head] * (scale or q.shape[-1] ** -0.5)
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                out[i, head] = torch.softmax(scores, 0) @ v[first : own + 1, head // heads]
    return out


def flash_attn_2(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                 causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):  # fmt: skip
    assert causal and dropout_p == 0.0 and window_size[1] in (-1, 0)
    return varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale, left=window_size[0],
        softcap=softcap,
    )  # fmt: skip


def flash_attn_4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False,
                 window_size=(None, None), learnable_sink=None, softcap=0.0):  # fmt: skip
    assert causal and learnable_sink is None and window_size[1] in (None, 0)
    left = -1 if window_size[0] is None else window_size[0]
    longest = (int(cu.diff().max()) for cu in (cu_seqlens_q, cu_seqlens_k))
    out = varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, scale=softmax_scale, left=left, softcap=softcap
    )  # fmt: skip
    return out, None


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False):  # fmt: skip
    assert window_size[1] == 0 and enable_gqa == (query.shape[1] != key.shape[1])
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, left=window_size[0])


def older_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal and query.shape[1] == key.shape[1]
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=None, left=-1)


def emulated(monkeypatch, kernel):
    """The backend whose kernel is emulated, and the function that emulates it."""
    flash_attn = {"flash_attn 2": flash_attn_2, "flash_attn 4": flash_attn_4}
    torch_varlen = {"torch_varlen": varlen_attn, "older torch_varlen": older_varlen_attn}
    functions = {"flash_attn": flash_attn.get(kernel), "torch_varlen": torch_varlen.get(kernel)}
    described = {name: function and flash.described(function) for name, function in functions.items()}
    monkeypatch.setattr(flash, "_installed", described)
    return BACKENDS["flash_attn" if kernel in flash_attn else "torch_varlen"]


@pytest.fixture
def inputs():
    return make_inputs()


def make_inputs(value_channels=CHANNELS, device="cpu", dtype=torch.float64, channels=CHANNELS, sequences=SEQUENCES):
    torch.manual_seed(0)
    layout = pack(sequences).layout.to(device)
    assert layout.kv_index is not None
    rows = int(layout.cu_seqlens_q[-1])
    shapes = ((HEADS, channels), (KV_HEADS, channels), (KV_HEADS, value_channels))
    q, k, v = (torch.randn(rows, *shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
    return q, k, v, layout


def check(attend, inputs, **options):
    q, k, v, layout = inputs
    wanted = [t for t in (q, k, v, options.get("sinks")) if t is not None]
    out, truth = attend(q, k, v, layout, **({"scale": None} | options)), exact(q, k, v, layout, **options)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(each, wanted, grad) for each in (out, truth)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "scale, window, softcap, sinks", list(product([None, 0.3], [None, 3], [None, 2.0], [False, True]))
)
def test_sdpa(inputs, scale, window, softcap, sinks):
    sinks = torch.randn(HEADS, dtype=torch.float64, requires_grad=True) if sinks else None
    check(BACKENDS["sdpa"].attend, inputs, scale=scale, window=window, softcap=softcap, sinks=sinks)


@pytest.mark.parametrize("value_channels", [CHANNELS, 5])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kernel", ["flash_attn 2", "flash_attn 4", "torch_varlen", "older torch_varlen"])
def test_variable_length_kernels(monkeypatch, kernel, scale, window, softcap, value_channels):
    backend = emulated(monkeypatch, kernel)
    needs = Needs("cuda", torch.bfloat16, window=window is not None, softcap=softcap is not None)
    why_not = backend.lacks(needs)
    if "torch_varlen" in kernel and softcap:
        assert why_not == "has no softcap"
    elif "older" in kernel and window:
        assert "no sliding window" in why_not
    else:
        assert why_not is None
        check(backend.attend, make_inputs(value_channels), scale=scale, window=window, softcap=softcap)


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


@pytest.mark.parametrize("kernel", ["torch_varlen", "flash_attn 4"])
def test_a_whole_model_through_an_emulated_kernel(monkeypatch, kernel):
    """The layout's indices as a kernel on a GPU would read them, forward and backward."""
    backend = emulated(monkeypatch, kernel)
    monkeypatch.setattr(flash, "_kernel_lacks", lambda needs: None)
    model, rows = tiny_model(dtype=torch.float64), random_rows(2, seed=6, prompt=(2, 5), answer=(1, 4))
    ours = fastdpo.sequence_logps(model, PreferenceCollator()(rows), attention_backend=backend.name)
    exact = naive_sequence_logps(model, rows)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(sums.sum(), list(model.parameters())) for sums in (ours, exact)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


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

    monkeypatch.setattr(flash, "_installed", {"flash_attn": None, "torch_varlen": flash.described(traceable)})
    monkeypatch.setattr(flash, "_kernel_lacks", lambda needs: None)
    from torch._dynamo.utils import counters

    model, rows = tiny_model(), random_rows(9, seed=3)
    torch._dynamo.reset()
    counters.clear()
    compiled_layers(model, fullgraph=True)
    for i in (0, 3, 6):
        forward_logps(model, PreferenceCollator()(rows[i : i + 3]), attention_backend="torch_varlen")  # no true kernel
    assert counters["stats"]["unique_graphs"] <= 3 and not counters["graph_break"]


def needs(device="cuda", dtype=torch.bfloat16, **features):
    return Needs(device, dtype, **features)


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
    ],
)
def test_automatic_choice(monkeypatch, wanted, chosen):
    emulated(monkeypatch, "flash_attn 2")
    assert select_backend("auto", wanted).name == chosen


def test_automatic_choice_without_flash_attn(monkeypatch):
    emulated(monkeypatch, "torch_varlen")
    assert select_backend("auto", needs()).name == "torch_varlen"
    assert select_backend("auto", needs(softcap=True)).name == "flex"
    assert select_backend("auto", needs(dropout=True)).name == "sdpa"
    emulated(monkeypatch, "older torch_varlen")
    assert select_backend("auto", needs(window=True)).name == "sdpa"
    emulated(monkeypatch, "nothing")
    assert select_backend("auto", needs()).name == "sdpa"


@pytest.mark.parametrize(
    "name, wanted, message",
    [
        ("flash_attn", needs("cpu"), "'flash_attn' runs on GPUs only, and the model is on cpu"),
        (
            "flash_attn",
            needs(dtype=torch.float32),
            "float16 and bfloat16 only, and the attention runs in torch.flo",
        ),
        ("flash_attn", needs(sinks=True), "gives attention sinks no gradient"),
        ("flash_attn", needs(head_dim=320), "at most 256 channels, and these have 320"),
        ("flex", needs(dropout=True), "'flex' has no dropout"),
        ("flex", needs("cpu"), "runs on GPUs only"),
        ("torch_varlen", needs(), "is not there; it comes with torch 2.10"),
        ("xformers", needs(), "unknown; known are: auto, flash_attn, torch_varlen, flex, sdpa"),
    ],
)
def test_a_backend_asked_for_by_name_serves_or_raises(monkeypatch, name, wanted, message):
    emulated(monkeypatch, "flash_attn 2")
    with pytest.raises(ValueError, match=message):
        select_backend(name, wanted)


def test_what_to_install(monkeypatch):
    emulated(monkeypatch, "nothing")
    with pytest.raises(ValueError, match="'flash_attn' is not there; pip install flash-attn; or choose 'auto'"):
        select_backend("flash_attn", needs())


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("feature", ["plain", "softcap", "sinks"])
@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen", "flex"])
def test_kernels_on_a_gpu_against_the_equation(name, feature, window):
    """Grouped queries, segments whose queries are fewer than their keys, forward and backward."""
    wanted = Needs("cuda", torch.bfloat16, **({} if feature == "plain" else {feature: True}), window=window is not None)
    if (why_not := BACKENDS[name].lacks(wanted)) is not None:
        pytest.skip(f"{name} {why_not}")
    system = [1] * 70
    sequences = [([*system, *[2 + p] * 60], [9 + a] * (30 + 20 * a)) for p in range(2) for a in range(2)]
    q, k, v, layout = make_inputs(64, "cuda", torch.bfloat16, 64, [*sequences, ([30] * 20, [31] * 130)])
    options = {"scale": None, "window": window}
    options |= {"softcap": 5.0} if feature == "softcap" else {}
    sinks = torch.randn(HEADS, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    tensors = [q, k, v, *([sinks] if feature == "sinks" else [])]

    def run(attend, dtype):
        copies = [t.detach().to(dtype).requires_grad_() for t in tensors]
        extra = {"sinks": copies[3]} if feature == "sinks" else {}
        out = attend(*copies[:3], layout, **options, **extra)
        torch.manual_seed(1)
        return [out, *torch.autograd.grad(out, copies, torch.randn_like(out, dtype=torch.float32).to(dtype))]

    truth = run(exact, torch.float64)
    naive = run(BACKENDS["sdpa"].attend, torch.bfloat16)
    ours = run(BACKENDS[name].attend, torch.bfloat16)
    for a, n, e in zip(ours, naive, truth, strict=True):
        ours_error, naive_error = ((x.double() - e).abs().max() for x in (a, n))
        assert ours_error <= 2 * naive_error + 1e-3
        assert math.isfinite(ours_error)
