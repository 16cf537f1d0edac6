"""Packed attention as the tests know it: its equation, and stand-ins for the kernels of a GPU.

The stand-ins have the signatures and the limits of the sources that they name, and compute from the documented meaning
alone, on a CPU and in any dtype.
"""

from itertools import pairwise

import torch

from fastdpo.attention import Needs, flash
from fastdpo.packing import pack

SEQUENCES = [([1] * 5, [2] * 3), ([1] * 5, [3] * 4), ([1] * 5, [4]), ([5] * 2, [6] * 2), ([7] * 9, [8])]
HEADS, KV_HEADS, CHANNELS = 4, 2, 8


def needs(device="cuda", dtype=torch.bfloat16, **features):
    return Needs(device, dtype, **features)


def make_inputs(
    value_channels=None, device="cpu", dtype=torch.float64, channels=CHANNELS, sequences=SEQUENCES, heads=HEADS,
    kv_heads=KV_HEADS,
):  # fmt: skip
    """Queries, keys and values of a packed row whose segments share prefixes, and its layout."""
    torch.manual_seed(0)
    layout = pack(sequences).layout.to(device)
    assert layout.kv_index is not None
    rows = int(layout.cu_seqlens_q[-1])
    shapes = ((heads, channels), (kv_heads, channels), (kv_heads, value_channels or channels))
    q, k, v = (torch.randn(rows, *shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
    return q, k, v, layout


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


def check(attend, inputs, **options):
    """`attend`, forward and backward, against the equation."""
    q, k, v, layout = inputs
    wanted = [t for t in (q, k, v, options.get("sinks")) if t is not None]
    out, truth = attend(q, k, v, layout, **({"scale": None} | options)), exact(q, k, v, layout, **options)
    torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
    grad = torch.randn_like(out)
    for ours, theirs in zip(*(torch.autograd.grad(each, wanted, grad) for each in (out, truth)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, left, softcap=None, sinks=None):
    """softmax(scale q k.T) v segment by segment, causal from the bottom right, from the documented meaning alone.

    q (T, H, d), k and v (K, H_kv, d); `left`: how many keys before its own a query sees, -1 for all.
    """
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    assert q.shape[-1] == k.shape[-1] and k.shape[1] == v.shape[1] and q.shape[1] % k.shape[1] == 0
    assert q.shape[-1] % 8 == 0 and v.shape[-1] % 8 == 0
    groups = q.shape[1] // k.shape[1]
    out = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        own = torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None]
        keys = torch.arange(k1 - k0)[None, :]
        seen = (keys <= own) & ((keys >= own - left) if left >= 0 else True)
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1].repeat_interleave(groups, 1))
        scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype)[:, None, None].expand(-1, q1 - q0, 1)], 2)
        weights = torch.softmax(scores, 2)[..., : k1 - k0]
        out.append(torch.einsum("hqk,khd->qhd", weights, v[k0:k1].repeat_interleave(groups, 1)))
    return torch.cat(out)


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """flash_attn_varlen_func of flash-attn 2.8.3."""
    assert causal and dropout_p == 0.0 and window_size[1] in (-1, 0) and q.shape[-1] == v.shape[-1] <= 256
    CALLS.append({"key": k, "deterministic": deterministic})
    return varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale, left=window_size[0],
        softcap=softcap,
    )  # fmt: skip


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
):  # fmt: skip
    """flash_attn_interface.flash_attn_varlen_func, as flash-attn 2.8.3 has it in its folder hopper."""
    assert causal and window_size[1] in (-1, 0) and q.shape[-1] == v.shape[-1] <= 256
    return varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale, left=window_size[0],
        softcap=softcap,
    )  # fmt: skip


def flash_attn_4(capability):
    """flash_attn.cute.flash_attn_varlen_func of flash-attn-4 4.0.0b36 on a GPU of this compute capability."""

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):  # fmt: skip
        sizes = (q.shape[-1], v.shape[-1])
        assert causal and window_size[1] in (None, 0) and isinstance(softcap, float)
        if capability == 9:
            assert max(sizes) <= 256 and (q.shape[1] == k.shape[1] or sizes[0] == sizes[1])
        else:
            assert max(sizes) <= 128 or (capability < 12 and sizes in ((192, 128), (256, 256)))
            assert sizes != (256, 256) or (learnable_sink is None and softcap == 0.0)
        if learnable_sink is not None:
            assert capability < 12 and learnable_sink.shape == (q.shape[1],)
        CALLS.append({"key": k, "sinks": learnable_sink, "sizes": sizes})
        left = -1 if window_size[0] is None else window_size[0]
        out = varlen(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale=softmax_scale, left=left,
            softcap=softcap, sinks=learnable_sink,
        )  # fmt: skip
        return out, None

    return flash_attn_varlen_func


def varlen_attn_213(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn of torch 2.13."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    return varlen_attn_211(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


def varlen_attn_211(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
):  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn of torch 2.11, whose kernel takes as many heads of keys as divide those of
    queries."""
    assert isinstance(window_size, tuple) and window_size[1] == 0  # of a list, it would not see that it is causal
    assert query.shape[-1] == value.shape[-1] <= 256
    CALLS.append({"key": key})
    return varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, left=window_size[0])


CALLS = []  # what was handed to the stand-ins, the latest last

KERNELS = {
    "flash-attn 2": ("flash_attn", flash_attn_2, 2, 8),
    "flash-attn 3": ("flash_attn", flash_attn_3, 3, 9),
    "flash-attn 4 on Hopper": ("flash_attn", flash_attn_4(9), 4, 9),
    "flash-attn 4 on Blackwell": ("flash_attn", flash_attn_4(10), 4, 10),
    "flash-attn 4 on a desk": ("flash_attn", flash_attn_4(12), 4, 12),
    "torch 2.13": ("torch_varlen", varlen_attn_213, 0, 8),
    "torch 2.11": ("torch_varlen", varlen_attn_211, 0, 8),
    "torch 2.11 on Turing": ("torch_varlen", varlen_attn_211, 0, 7),
}


def emulate(monkeypatch, *names):
    """Has `fastdpo.attention.flash` find these kernels installed, newest first, and no others."""
    CALLS.clear()
    found = {"flash_attn": (), "torch_varlen": ()}
    for backend, function, version, capability in (KERNELS[name] for name in names):
        found[backend] += (flash.described(function, version, capability),)
    monkeypatch.setattr(flash, "_installed", found)
