"""The variable-length backends' contract, through an emulation; and which backend is chosen."""

from itertools import pairwise

import pytest
import torch
from tiny import naive_sequence_logps, random_rows, tiny_model

import fastdpo
from fastdpo.attention import BACKENDS, flash, sdpa, select_backend
from fastdpo.packing import Group, PreferenceCollator, pack


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, left):
    """softmax(scale q k.T) v segment by segment, causal from the bottom right, from the documented meaning alone.

    q (T, H, d), k and v (K, H_kv, d); `left`: how many keys before its own a query sees, -1 for all.
    """
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    heads = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        for i in range(q0, q1):
            own = int(k0 + (k1 - k0) - (q1 - q0) + (i - q0))
            first = int(k0) if left < 0 else max(int(k0), own - left)
            for head in range(q.shape[1]):
                scores = k[first : own + 1, head // heads] @ q[i, head] * (scale or q.shape[-1] ** -0.5)
                out[i, head] = torch.softmax(scores, 0) @ v[first : own + 1, head // heads]
    return out


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1)):  # fmt: skip
    assert causal and dropout_p == 0.0 and window_size[1] in (-1, 0)
    return varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale, left=window_size[0]
    )


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
                window_size=(-1, -1), enable_gqa=False):  # fmt: skip
    assert window_size[1] == 0 and enable_gqa == (query.shape[1] != key.shape[1])
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, left=window_size[0])


def older_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    assert is_causal and query.shape[1] == key.shape[1]
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=None, left=-1)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    layout = pack([Group([1] * 5, [[2] * 3, [3] * 4, [4]]), Group([5] * 2, [[6] * 2])]).layout
    rows, keys = int(layout.cu_seqlens_q[-1]), int(layout.cu_seqlens_k[-1])
    q, k, v = (torch.randn(n, h, 8, dtype=torch.float64) for n, h in ((rows, 4), (keys, 2), (keys, 2)))
    return q, k, v, layout


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "older torch_varlen"])
def test_backends_agree_with_sdpa(monkeypatch, inputs, backend, scale, window):
    q, k, v, layout = inputs
    expected = sdpa.attend(q, k, v, layout, scale=scale, window=window)
    monkeypatch.setattr(flash, "flash_attn_function", lambda: flash_attn_varlen_func)
    function = older_varlen_attn if backend == "older torch_varlen" else varlen_attn
    monkeypatch.setattr(flash, "torch_varlen_function", lambda: function)
    attend = flash.attend_flash_attn if backend == "flash_attn" else flash.attend_torch_varlen
    if backend == "older torch_varlen" and window is not None:
        with pytest.raises(ValueError, match="no sliding window"):
            attend(q, k, v, layout, scale=scale, window=window)
        return
    torch.testing.assert_close(attend(q, k, v, layout, scale=scale, window=window), expected)


def test_dropout_that_a_kernel_lacks_is_refused(monkeypatch, inputs):
    monkeypatch.setattr(flash, "torch_varlen_function", lambda: varlen_attn)
    with pytest.raises(ValueError, match="dropout"):
        flash.attend_torch_varlen(*inputs, scale=None, dropout=0.1)


def test_a_whole_model_through_the_emulated_kernel(monkeypatch):
    """The layout's indices as a kernel on a GPU would read them, forward and backward."""
    monkeypatch.setattr(flash, "torch_varlen_function", lambda: varlen_attn)
    monkeypatch.setattr(type(BACKENDS["torch_varlen"]), "lacks", lambda *args: None)
    model, rows = tiny_model(dtype=torch.float64), random_rows(2, seed=6, prompt=(2, 5), answer=(1, 4))
    ours = fastdpo.sequence_logps(model, PreferenceCollator()(rows), attention_backend="torch_varlen")
    exact = naive_sequence_logps(model, rows)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(sums.sum(), list(model.parameters())) for sums in (ours, exact)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_selection():
    cpu = torch.device("cpu")
    assert select_backend("auto", cpu, torch.float32).name == "sdpa"
    with pytest.raises(ValueError, match="runs on GPUs only"):
        select_backend("flash_attn", cpu, torch.bfloat16)
    with pytest.raises(ValueError, match="unknown; known are: auto, flash_attn, torch_varlen, sdpa"):
        select_backend("xformers", cpu, torch.float32)
    cuda = torch.device("cuda")
    assert "float16 and bfloat16 only" in BACKENDS["flash_attn"].lacks(cuda, torch.float32)
    assert select_backend("auto", cuda, torch.float32).name == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen"])
def test_kernels_on_a_gpu_agree_with_sdpa(inputs, name):
    device = torch.device("cuda")
    if BACKENDS[name].lacks(device, torch.bfloat16):
        pytest.skip(f"{name} is not installed")
    q, k, v, layout = inputs
    q, k, v = (
        torch.randn(*t.shape[:2], 64, device=device, dtype=torch.bfloat16, requires_grad=True) for t in (q, k, v)
    )
    layout = layout.to(device)
    exact_inputs = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact = sdpa.attend(*exact_inputs, layout, scale=None)
    naive_inputs = [t.detach().requires_grad_() for t in (q, k, v)]
    naive = sdpa.attend(*naive_inputs, layout, scale=None)
    ours = BACKENDS[name].attend(q, k, v, layout, scale=None)
    grad = torch.randn_like(ours)
    for a, n, e in zip(
        [ours, *torch.autograd.grad(ours, (q, k, v), grad)],
        [naive, *torch.autograd.grad(naive, naive_inputs, grad)],
        [exact, *torch.autograd.grad(exact, exact_inputs, grad.double())],
        strict=True,
    ):
        ours_error, naive_error = ((x.double() - e).abs().max() for x in (a, n))
        assert ours_error <= 2 * naive_error + 1e-3
