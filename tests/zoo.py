"""Tiny random models of many architectures, each with the packing that it should allow and, if not "prefix", why."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import VOCABULARY
from torch.overrides import TorchFunctionMode

WINDOW = 4  # of every sliding window here; the rows of `zoo_rows` are longer

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ALTERNATING = ["sliding_attention", "full_attention"]
_SOFTCAPS = {
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
    "attn_implementation": "eager",  # where it is the default, transformers' SDPA leaves the softcap out
}
_RECURRENT = "recurrent layers"
_BY_HAND = "hand-written attention"


@dataclass(frozen=True)
class Architecture:
    """model_type: as transformers' AutoConfig knows it. packing: the best that this architecture allows."""

    name: str
    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    packing: str = "prefix"
    reason: str = ""


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
_DEEPSEEK_EXPERTS = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_DEEPSEEK = _MLA | _DEEPSEEK_EXPERTS
_MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
_DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
}

ARCHITECTURES = [
    Architecture("llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    Architecture("llama, untied, one head for keys", "llama", {"num_key_value_heads": 1, "tie_word_embeddings": False}),
    Architecture("llama, linear rope", "llama", _rope("linear", factor=2.0)),
    Architecture(
        "llama, yarn", "llama", _rope("yarn", factor=4.0, original_max_position_embeddings=8) | {"head_dim": 16}
    ),
    Architecture(
        "llama, llama3 rope",
        "llama",
        _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8),
    ),
    Architecture("qwen2", "qwen2", {"tie_word_embeddings": True}),
    Architecture(
        "qwen2, window", "qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    ),
    Architecture("qwen3", "qwen3", {"head_dim": 16}),
    Architecture("qwen2-moe", "qwen2_moe", {**_MOE, "shared_expert_intermediate_size": 32}),
    Architecture(
        "qwen2-moe, window",
        "qwen2_moe",
        {
            **_MOE,
            "shared_expert_intermediate_size": 32,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
        },
    ),
    Architecture("qwen3-moe", "qwen3_moe", {**_MOE, "head_dim": 16, "norm_topk_prob": True}),
    Architecture("mistral", "mistral", {"sliding_window": WINDOW}),
    Architecture("ministral", "ministral", {"sliding_window": WINDOW, "layer_types": _ALTERNATING, "head_dim": 16}),
    Architecture("mixtral", "mixtral", {**_MIXTRAL, "sliding_window": WINDOW}),
    Architecture("gemma", "gemma", {"head_dim": 16, "hidden_activation": "gelu_pytorch_tanh"}),
    Architecture(
        "gemma2",
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            **_SOFTCAPS,
        },
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": WINDOW,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
            },
        },
    ),
    Architecture("phi", "phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    Architecture("phi3", "phi3", {"sliding_window": WINDOW}),
    Architecture("phimoe", "phimoe", {**_MIXTRAL, "sliding_window": WINDOW, "router_jitter_noise": 0.0}),
    Architecture("gpt2", "gpt2", _GPT2),
    Architecture("gpt2, scaled by layer", "gpt2", {**_GPT2, "scale_attn_by_inverse_layer_idx": True}),
    Architecture("gpt-bigcode", "gpt_bigcode", {**_GPT2, "multi_query": True}),
    Architecture(
        "gpt-neo",
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        "padded",
        _BY_HAND,
    ),
    Architecture("gpt-j", "gptj", {**_GPT2, "rotary_dim": 4}, "padded", _BY_HAND),
    Architecture("gpt-neox", "gpt_neox", {"rotary_pct": 0.5, "attention_bias": True}),
    Architecture("opt", "opt", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    Architecture("biogpt", "biogpt", {}),
    Architecture("olmo", "olmo", {"clip_qkv": 1.0}),
    Architecture("olmo2", "olmo2", {}),
    Architecture("olmo3", "olmo3", {"sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    Architecture("olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        {**_MIXTRAL, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "head_dim": 16, **_rope("default")},
    ),
    Architecture(
        "falcon, rotary",
        "falcon",
        {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
        "padded",
        _BY_HAND,
    ),
    Architecture("falcon, alibi", "falcon", {"alibi": True, "bias": True}, "padded", "hand-written attention (ALiBi)"),
    Architecture("bloom", "bloom", {"n_layer": 2, "n_head": 4}, "padded", "hand-written attention (ALiBi)"),
    Architecture(
        "mpt",
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
        "padded",
        "hand-written attention (ALiBi)",
    ),
    Architecture("smollm3", "smollm3", {"no_rope_layers": [1, 0]}),
    Architecture(
        "granite",
        "granite",
        {
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 4.0,
        },
    ),
    Architecture(
        "granite-moe",
        "granitemoe",
        {**_MIXTRAL, "attention_multiplier": 0.3, "logits_scaling": 4.0, "residual_multiplier": 0.5},
    ),
    Architecture(
        "granite-moe, hybrid",
        "granitemoehybrid",
        {
            **_MAMBA2,
            **_MIXTRAL,
            "shared_intermediate_size": 32,
            "layer_types": ["mamba", "attention"],
        },
        "padded",
        _RECURRENT,
    ),
    Architecture("cohere", "cohere", {"logit_scale": 0.5, "use_qk_norm": True}),
    Architecture(
        "cohere2", "cohere2", {"logit_scale": 0.5, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "head_dim": 8}
    ),
    Architecture("starcoder2", "starcoder2", {"sliding_window": WINDOW, "use_bias": True}),
    Architecture("stablelm", "stablelm", {"qk_layernorm": True, "use_qkv_bias": True, "use_parallel_residual": True}),
    Architecture("nemotron", "nemotron", {"partial_rotary_factor": 0.5}),
    Architecture("glm", "glm", {"head_dim": 8, "attention_bias": True}),
    Architecture("glm4", "glm4", {"head_dim": 8, "attention_bias": True}),
    Architecture("glm4-moe", "glm4_moe", {**_DEEPSEEK_EXPERTS, "head_dim": 8, "use_qk_norm": True}),
    Architecture("deepseek-v2", "deepseek_v2", {**_DEEPSEEK, "topk_method": "group_limited_greedy"}),
    Architecture("deepseek-v3", "deepseek_v3", _DEEPSEEK),
    Architecture(
        "exaone4", "exaone4", {"sliding_window": WINDOW, "sliding_window_pattern": None, "layer_types": _ALTERNATING}
    ),
    Architecture("hunyuan", "hunyuan_v1_dense", {"head_dim": 8, "attention_bias": True}),
    Architecture("ernie 4.5", "ernie4_5", {"head_dim": 8, "use_bias": True}),
    Architecture("seed-oss", "seed_oss", {"head_dim": 8, "attention_out_bias": True}),
    Architecture("arcee", "arcee", {}),
    Architecture("apertus", "apertus", {}),
    Architecture("helium", "helium", {"head_dim": 8}),
    Architecture("persimmon", "persimmon", {"num_key_value_heads": 4}),
    Architecture("diffllama", "diffllama", {}),
    Architecture(
        "dbrx",
        "dbrx",
        {
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
            **_rope("default"),
        },
    ),
    Architecture("jetmoe", "jetmoe", {}),
    Architecture("doge", "doge", {"attn_implementation": "eager"}, "padded", "a mask computed from the values"),
    Architecture(
        "vaultgemma",
        "vaultgemma",
        {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW, **_SOFTCAPS},
    ),
    Architecture("nanochat", "nanochat", {"final_logit_softcapping": 3.0}),
    Architecture(
        "afmoe",
        "afmoe",
        {**_MOE, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "head_dim": 8, "num_dense_layers": 1},
    ),
    Architecture("bitnet", "bitnet", {}),
    Architecture("ctrl", "ctrl", {**_GPT2, "dff": 64}),
    Architecture("cwm", "cwm", {"sliding_window": WINDOW, "layer_types": _ALTERNATING, "head_dim": 8}),
    Architecture(
        "dots1", "dots1", {**_DEEPSEEK_EXPERTS, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "head_dim": 8}
    ),
    Architecture(
        "ernie 4.5, moe",
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_start_index": 1},
    ),
    Architecture(
        "exaone-moe",
        "exaone_moe",
        {**_MOE, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "n_group": 1, "topk_group": 1},
    ),
    Architecture("flex-olmo", "flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    Architecture("glm4-moe, lite", "glm4_moe_lite", _DEEPSEEK),
    Architecture("granite, window and sinks", "granite_swa", {"sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    Architecture(
        "granite-moe, window and sinks",
        "granitemoe_swa",
        {**_MIXTRAL, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
    ),
    Architecture("hunyuan-moe", "hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2, "head_dim": 8}),
    Architecture("hy3", "hy_v3", {**_MOE, "head_dim": 8}),
    Architecture("hyperclova x", "hyperclovax", {"logits_scaling": 0.5, "head_dim": 8}),
    Architecture("jais2", "jais2", {"head_dim": 8}),
    Architecture("laguna", "laguna", {**_MOE, "sliding_window": WINDOW, "layer_types": _ALTERNATING, "head_dim": 8}),
    Architecture(
        "longcat-flash",
        "longcat_flash",
        {
            **_DEEPSEEK,
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 32,
            "moe_topk": 2,
            "zero_expert_num": 1,
            "head_dim": 8,
        },
    ),
    Architecture("mellum", "mellum", {**_MOE, "sliding_window": WINDOW, "layer_types": _ALTERNATING}),
    Architecture("mimo-v2-flash", "mimo_v2_flash", {**_MOE, "n_routed_experts": 4, "sliding_window": WINDOW}),
    Architecture("minicpm3", "minicpm3", {**_MLA, "scale_depth": 1.4, "dim_model_base": 16}),
    Architecture("minimax-m2", "minimax_m2", {**_MIXTRAL, "head_dim": 8}),
    Architecture(
        "ministral3",
        "ministral3",
        {
            "sliding_window": WINDOW,
            "head_dim": 8,
            **_rope(
                "yarn", factor=4.0, original_max_position_embeddings=4, llama_4_scaling_beta=0.5, mscale_all_dim=1.0
            ),
        },
    ),
    Architecture("youtu", "youtu", _MLA),
    Architecture("hrm", "hrm_text", {"num_hidden_layers": 1}),
    Architecture(
        "deepseek-v3.2",
        "deepseek_v32",
        {**_DEEPSEEK, "index_topk": 64, "index_n_heads": 2, "index_head_dim": 8},
        "padded",
        "sparse attention",
    ),
    Architecture(
        "deepseek-v4",
        "deepseek_v4",
        {
            **_DEEPSEEK_EXPERTS,
            "sliding_window": WINDOW,
            "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            "head_dim": 16,
            "q_lora_rank": 24,
            "o_lora_rank": 8,
            "o_groups": 2,
            "index_topk": 64,
        },
        "padded",
        "attention over compressed keys",
    ),
    Architecture(
        "minimax-m3",
        "minimax_m3_vl_text",
        {
            **_MIXTRAL,
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "head_dim": 8,
            "shared_intermediate_size": 32,
        },
        "padded",
        "sparse attention",
    ),
    Architecture(
        "xglm", "xglm", {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4}, "padded", _BY_HAND
    ),
    Architecture("codegen", "codegen", {**_GPT2, "rotary_dim": 4, "n_ctx": 256}, "padded", _BY_HAND),
    Architecture("gpt", "openai-gpt", _GPT2, "padded", _BY_HAND),
    Architecture("gpt-neox-japanese", "gpt_neox_japanese", {}, "padded", _BY_HAND),
    Architecture("rwkv", "rwkv", {"attention_hidden_size": 32}, "padded", _RECURRENT),
    Architecture("xlstm", "xlstm", {}, "padded", _RECURRENT),
    Architecture("falcon-mamba", "falcon_mamba", {"state_size": 8}, "padded", _RECURRENT),
    Architecture(
        "mamba2",
        "mamba2",
        {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        "padded",
        _RECURRENT,
    ),
    Architecture("olmo-hybrid", "olmo_hybrid", {}, "padded", _RECURRENT),
    Architecture("qwen3.5", "qwen3_5_text", _DELTA, "padded", _RECURRENT),
    Architecture(
        "llama4",
        "llama4_text",
        {
            **_MIXTRAL,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 64,
            "head_dim": 8,
            "attention_chunk_size": WINDOW,
            "num_hidden_layers": 4,
            "moe_layers": [1],
        },
        "padded",
        "chunked attention",
    ),
    Architecture(
        "minimax",
        "minimax",
        {**_MIXTRAL, "layer_types": ["linear_attention", "full_attention"], "block_size": 4, "head_dim": 8},
        "padded",
        "linear attention",
    ),
    Architecture("mamba", "mamba", {"state_size": 8}, "padded", _RECURRENT),
    Architecture("falcon-h1", "falcon_h1", {**_MAMBA2, "mamba_d_ssm": 64}, "padded", _RECURRENT),
    Architecture(
        "qwen3-next", "qwen3_next", {**_MOE, **_DELTA, "shared_expert_intermediate_size": 32}, "padded", _RECURRENT
    ),
    Architecture(
        "recurrent-gemma",
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": WINDOW, "num_hidden_layers": 3, "head_dim": 8},
        "padded",
        _RECURRENT,
    ),
    Architecture(
        "jamba",
        "jamba",
        {
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
        "padded",
        _RECURRENT,
    ),
    Architecture("bamba", "bamba", {**_MAMBA2, "attn_layer_indices": [1]}, "padded", _RECURRENT),
    Architecture(
        "zamba2",
        "zamba2",
        {
            "mamba_d_state": 8,
            "mamba_headdim": 16,
            "n_mamba_heads": 4,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "layers_block_type": ["mamba", "hybrid"],
            "num_mem_blocks": 1,
            "use_mem_rope": True,
            "num_key_value_heads": 4,
        },
        "padded",
        _RECURRENT,
    ),
    Architecture(
        "lfm2", "lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}, "padded", "convolution layers"
    ),
]


# Rotary frequencies that change for the whole batch where one sequence is longer than 13, as some of `rows` are.
LENGTH_DEPENDENT = [
    Architecture("llama, dynamic rope", "llama", {**_rope("dynamic", factor=4.0), "max_position_embeddings": 13}),
    Architecture(
        "phi3, longrope",
        "phi3",
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 13,
            **_rope("longrope", short_factor=[1.0, 1.5, 2.0, 3.0], long_factor=[1.0, 4.0, 8.0, 16.0], factor=4.0),
        },
    ),
]


def make(architecture: Architecture, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random model in evaluation mode; its weights are large enough that a mistake moves its log-probs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(architecture.model_type, **(_SHAPE | architecture.config))
    # Grouped matrix products have no float64.
    options = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_config(config, **options).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
        else:  # norms, biases, sinks: none of them neutral
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def rows(seed: int = 0) -> list[dict[str, list[int]]]:
    """Tokenized rows that share what rows can share: a prompt, the beginning of a prompt, or of the two answers.

    With one-token answers, equal answers, an empty prompt, and sequences of several windows.
    """
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(count)]

    prompt, beginning, answer = ids(9), ids(3), ids(4)
    return [
        {"prompt_ids": prompt, "chosen_ids": ids(6), "rejected_ids": ids(3)},
        {"prompt_ids": prompt, "chosen_ids": ids(1), "rejected_ids": ids(7)},
        {"prompt_ids": prompt + ids(3), "chosen_ids": beginning + ids(2), "rejected_ids": beginning + ids(5)},
        {"prompt_ids": ids(2), "chosen_ids": answer, "rejected_ids": answer},
        {"prompt_ids": [], "chosen_ids": ids(5), "rejected_ids": ids(2)},
        {"prompt_ids": ids(1), "chosen_ids": ids(8), "rejected_ids": ids(1)},
    ]


class DoublePrecision(TorchFunctionMode):
    """Within it float32 means float64: transformers casts to float32 in norms, rotary embeddings, routers and softmax,
    which would drown errors below 1e-7 in a float64 model."""

    def __enter__(self) -> Any:
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.set_default_dtype(torch.float32)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)
