"""The variable-length kernels of flash-attn and PyTorch, through stand-ins with their signatures and limits."""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from drawing import pairwise
from packed_attention import (
    CALLS,
    HEADS,
    KERNELS,
    check,
    emulate,
    flash_attn_2,
    flash_attn_3,
    flash_attn_4,
    make_inputs,
    needs,
    varlen_attn_211,
    varlen_attn_213,
)
from tiny import in_double_precision, naive_sequence_logps, random_rows, tiny_model

import fastdpo
from fastdpo.attention import BACKENDS, Needs, flash, select_backend
from fastdpo.packing import PreferenceCollator

SIZES = [(8, None), (8, 5), (4, 12)]


@pytest.mark.parametrize(
    "name, scale, window, softcap, sinks, sizes",
    pairwise([*KERNELS][:-1], [None, 0.3], [None, 3], [None, 2.0], [False, True], SIZES),
)
def test_kernels_against_the_equation(monkeypatch, name, scale, window, softcap, sinks, sizes):
    """Forward and backward: grouped heads, segments whose queries are fewer than their keys, values of another size."""
    emulate(monkeypatch, name)
    backend = BACKENDS[KERNELS[name][0]]
    why_not = backend.lacks(needs(window=window is not None, softcap=softcap is not None, sinks=sinks))
    gives_sinks = name in ("flash-attn 4 on Hopper", "flash-attn 4 on Blackwell")
    if sinks and not gives_sinks:
        assert why_not.startswith("gives attention sinks no gradient")
        sinks = False
    if softcap and "torch" in name:
        assert why_not is not None
        softcap = None
    monkeypatch.setattr(flash, "_misses", lambda kernel, needs: None)  # of a CPU and of float64
    options = {"scale": scale, "window": window, "softcap": softcap}
    if sinks:
        assert why_not is None
        options["sinks"] = torch.randn(HEADS, dtype=torch.float64, requires_grad=True)
    check(backend.attend, make_inputs(sizes[1], channels=sizes[0]), **options)


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (6, 2), (2, 2), (3, 1)])
@pytest.mark.parametrize("name", ["torch 2.11", "torch 2.13", "flash-attn 2", "flash-attn 4 on Hopper"])
def test_keys_are_not_copied_for_the_heads_that_share_them(monkeypatch, name, heads, kv_heads):
    emulate(monkeypatch, name)
    monkeypatch.setattr(flash, "_misses", lambda kernel, needs: None)
    inputs = make_inputs(heads=heads, kv_heads=kv_heads)
    check(BACKENDS[KERNELS[name][0]].attend, inputs)
    (call,) = CALLS
    assert call["key"].shape == (inputs[3].cu_seqlens_k[-1], kv_heads, 8)


@pytest.mark.parametrize("name", ["flash-attn 4 on Hopper", "flash-attn 4 on Blackwell"])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_the_sizes_of_multi_head_latent_attention(monkeypatch, name, kv_heads):
    """Blackwell's kernel takes queries of 192 channels with values of 128 and no others beyond 128; Hopper's takes one
    size where heads are grouped."""
    emulate(monkeypatch, name)
    assert BACKENDS["flash_attn"].lacks(needs(head_dim=192, value_head_dim=128)) is None
    monkeypatch.setattr(flash, "_misses", lambda kernel, needs: None)
    check(BACKENDS["flash_attn"].attend, make_inputs(128, channels=192, heads=2, kv_heads=kv_heads))
    assert CALLS[0]["sizes"] == ((192, 192) if name.endswith("Hopper") else (192, 128))


def test_sinks_keep_their_dtype(monkeypatch):
    """Under autocast they are float32 beside bfloat16 queries, which flash-attn 4 takes."""
    emulate(monkeypatch, "flash-attn 4 on Hopper")
    monkeypatch.setattr(flash, "_misses", lambda kernel, needs: None)
    q, k, v, layout = make_inputs(dtype=torch.bfloat16)
    sinks = torch.randn(HEADS, requires_grad=True)
    BACKENDS["flash_attn"].attend(q, k, v, layout, scale=None, sinks=sinks).sum().backward()
    assert CALLS[0]["sinks"] is sinks and sinks.grad.abs().min() > 0


def test_the_stand_in_of_the_installed_torch_has_its_signature():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    theirs = inspect.signature(varlen.varlen_attn).parameters
    ours = inspect.signature(varlen_attn_213 if "enable_gqa" in theirs else varlen_attn_211).parameters
    used = [*theirs][:7] + ["scale", "window_size"] + (["enable_gqa"] if "enable_gqa" in theirs else [])
    for name in used:
        assert (ours[name].kind, ours[name].default) == (theirs[name].kind, theirs[name].default)
    assert [*ours][:7] == [*theirs][:7]


@pytest.mark.parametrize(
    "name, wanted, message",
    [
        ("flash-attn 2", needs("cpu"), "runs on GPUs only, and the model is on cpu"),
        ("flash-attn 2", needs(dtype=torch.float32), "float16 and bfloat16 only, and the attention runs in torch.fl"),
        ("flash-attn 2", needs(head_dim=320), "takes heads of at most 256 channels, and these have 320"),
        ("flash-attn 3", needs(value_head_dim=320), "takes heads of at most 256 channels, and these have 320"),
        ("flash-attn 2", needs(softcap=True, dropout=True), "has no dropout with softcap in flash-attn 2"),
        ("flash-attn 3", needs(dropout=True), "has no dropout in flash-attn 3"),
        ("flash-attn 4 on Hopper", needs(dropout=True), "has no dropout in flash-attn 4"),
        ("flash-attn 4 on Hopper", needs(head_dim=256, softcap=True, sinks=True, window=True), None),
        ("flash-attn 4 on Blackwell", needs(head_dim=128, value_head_dim=128, softcap=True, sinks=True), None),
        ("flash-attn 4 on Blackwell", needs(head_dim=192), "128 channels, of 256, or of 192 with values of 128"),
        ("flash-attn 4 on Blackwell", needs(head_dim=256, value_head_dim=256, window=True), None),
        ("flash-attn 4 on Blackwell", needs(head_dim=256, softcap=True), "has no softcap for heads of 256 channels"),
        ("flash-attn 4 on Blackwell", needs(head_dim=256, sinks=True), "has no sinks for heads of 256 channels"),
        ("flash-attn 4 on a desk", needs(softcap=True, window=True), None),
        ("flash-attn 4 on a desk", needs(sinks=True), "sinks no gradient (flash-attn 4 on compute capability 12)"),
        ("flash-attn 4 on a desk", needs(head_dim=192), "takes heads of at most 128 channels, and these have 192"),
        ("torch 2.11", needs(head_dim=256, window=True), None),
        ("torch 2.11", needs(head_dim=264), "takes heads of at most 256 channels, and these have 264"),
        ("torch 2.13", needs(dropout=True), "has no dropout in this torch"),
        ("torch 2.13", needs(sinks=True), "gives attention sinks no gradient"),
        ("torch 2.11 on Turing", needs(dtype=torch.float16), "compute capability 8.0 and later, and this one has 7"),
    ],
)  # fmt: skip
def test_what_each_kernel_lacks(monkeypatch, name, wanted, message):
    emulate(monkeypatch, name)
    why_not = BACKENDS[KERNELS[name][0]].lacks(wanted)
    assert why_not is None if message is None else message in why_not


def test_of_several_versions_the_newest_that_can_do_it_serves(monkeypatch):
    hopper = [KERNELS[name][1:3] for name in ("flash-attn 4 on Hopper", "flash-attn 3", "flash-attn 2")]
    monkeypatch.setattr(flash, "_installed", {"flash_attn": tuple(flash.described(*each, 9) for each in hopper)})
    served = {feature: flash.serving("flash_attn", needs(**{feature: True})) for feature in ("sinks", "dropout")}
    assert {feature: kernel.version for feature, kernel in served.items()} == {"sinks": 4, "dropout": 2}
    assert BACKENDS["flash_attn"].lacks(needs(sinks=True, dropout=True)) == "has no dropout in flash-attn 4"


def test_deterministic_algorithms_are_asked_for(monkeypatch):
    def asked():
        CALLS.clear()
        with monkeypatch.context() as patch:
            patch.setattr(flash, "_misses", lambda kernel, needs: None)
            q, k, v, layout = make_inputs()
            BACKENDS["flash_attn"].attend(q, k, v, layout, scale=None)
        return CALLS[0]["deterministic"]

    emulate(monkeypatch, "flash-attn 2")
    assert not asked()  # tests run with warn_only, with which PyTorch's own kernels do without too
    torch.use_deterministic_algorithms(True)
    assert asked()
    emulate(monkeypatch, "flash-attn 4 on a desk")
    assert "has no deterministic backward" in BACKENDS["flash_attn"].lacks(needs())


def installed_on(monkeypatch, capability, **modules):
    """The versions of flash-attn taken on a GPU of this capability where `modules` can be imported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (capability, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(flash, "_installed", {})
    for name in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface", "flash_attn_interface"):
        module = ModuleType(name)
        module.__dict__.update(modules.get(name.replace(".", "_"), {}))
        monkeypatch.setitem(sys.modules, name, module if module.__dict__.keys() - {*dir(ModuleType("x"))} else None)
    return [kernel.version for kernel in flash.installed("flash_attn")]


def test_which_versions_are_taken_on_which_gpu(monkeypatch):
    every = {
        "flash_attn": {"flash_attn_varlen_func": flash_attn_2},
        "flash_attn_interface": {"flash_attn_varlen_func": flash_attn_3},
        "flash_attn_cute": {"flash_attn_varlen_func": flash_attn_4(9)},
        "flash_attn_cute_interface": {"_flash_attn_bwd": lambda q, k, v, learnable_sink=None: None},
    }
    taken = {capability: installed_on(monkeypatch, capability, **every) for capability in (8, 9, 10, 12)}
    assert taken == {8: [2], 9: [4, 3, 2], 10: [4, 2], 12: [4, 2]}
    (varlen,) = flash.installed("torch_varlen")
    assert varlen.function is torch.nn.attention.varlen.varlen_attn and varlen.capability == 12
    # flash-attn 2.8 brings the beginnings of version 4 under the same name, whose backward takes no unequal lengths.
    every["flash_attn_cute_interface"] = {"_flash_attn_bwd": lambda q, k, v: None}
    assert installed_on(monkeypatch, 10, **every) == [2]
    assert installed_on(monkeypatch, 9) == []


def test_pytorchs_own_after_it_was_switched_to_flash_attn_4(monkeypatch):
    """Which in torch 2.11 misreads its windows; 2.12 has mended it."""
    monkeypatch.setattr(flash, "current_flash_attention_impl", lambda: "FA4")
    emulate(monkeypatch, "torch 2.11")
    assert "restore_flash_attention_impl()" in BACKENDS["torch_varlen"].lacks(needs())
    assert select_backend("auto", needs()).name == "sdpa"
    emulate(monkeypatch, "torch 2.13")
    assert BACKENDS["torch_varlen"].lacks(needs()) is None


@pytest.mark.parametrize("name", ["flash-attn 2", "torch 2.11"])
def test_choice_and_call_of_a_kernel_are_compiled_in_one_graph(monkeypatch, name):
    def operator(query, key, value, *places, **options):
        return query * key.mean() + value.mean()

    emulate(monkeypatch, name)
    backend, function, version, capability = KERNELS[name]
    kernel = flash.described(function, version, capability)._replace(function=operator)
    monkeypatch.setitem(flash._installed, backend, (kernel,))
    monkeypatch.setattr(flash, "_misses", flash._features)  # but for the CPU and float64
    q, k, v, layout = make_inputs()

    def attend(q, k, v):
        chosen = select_backend("auto", Needs.of(q, v, window=3, softcap=None, sinks=None, dropout=0.0))
        return chosen.attend(q, k, v, layout, scale=None, window=3)

    out = torch.compile(attend, backend="eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(out, attend(q, k, v))


def test_flash_attn_4_is_called_uncompiled():
    compiling = []

    def flash_attn_varlen_func(q):
        compiling.append(torch.compiler.is_compiling())
        return q * 2

    kernel = flash.described(flash_attn_varlen_func, 4, 9)
    assert kernel.parameters == {"q"}
    out = torch.compile(lambda x: kernel.function(x + 1) + 1, backend="eager")(torch.ones(2))
    assert out.tolist() == [5.0, 5.0] and compiling == [False]


def test_a_whole_model(monkeypatch):
    """The layout's indices as a kernel on a GPU would read them, forward and backward."""
    emulate(monkeypatch, "torch 2.11")
    monkeypatch.setattr(flash, "_misses", lambda kernel, needs: None)
    compare(tiny_model(dtype=torch.float64), random_rows(2, seed=6, prompt=(2, 5), answer=(1, 4)), "torch_varlen")
    assert CALLS


def test_gpt_oss_runs_on_flash_attn_4(monkeypatch):
    """All its layers, those with windows too, by the automatic choice; with flash-attn 2 it would be FlexAttention."""
    import zoo

    emulate(monkeypatch, "flash-attn 2")
    assert select_backend("auto", needs(sinks=True)).name == "flex"
    emulate(monkeypatch, "flash-attn 4 on Hopper")
    assert select_backend("auto", needs(sinks=True)).name == "flash_attn"
    monkeypatch.setattr(flash, "_misses", flash._features)  # but for the CPU and float64
    (architecture,) = (each for each in zoo.ARCHITECTURES if each.name == "gpt-oss")
    model = in_double_precision(zoo.make(architecture, torch.float64))
    compare(model, random_rows(2, seed=6, prompt=(5, 9), answer=(1, 4)), "auto")
    assert CALLS and all(call["sinks"] is not None for call in CALLS)


def compare(model, rows, backend):
    """Log-probs and gradients of packed rows, and of each sequence alone by transformers' own attention."""
    exact = naive_sequence_logps(model, rows)
    ours = fastdpo.sequence_logps(model, PreferenceCollator()(rows), attention_backend=backend)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(sums.sum(), parameters, allow_unused=True) for sums in (ours, exact)]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
