"""Tiny random reward models, and the scores that they give to sequences run alone."""

import torch
from tiny import VOCABULARY, in_double_precision

END = 2  # of the text, and the token to pad with

_LLAMA = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
SHAPES = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "mistral": _LLAMA | {"sliding_window": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "bert": _LLAMA,
}


def tiny_reward_model(kind="llama", dtype=torch.float32, seed=0, **config):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    shape = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": END, "pad_token_id": END, "num_labels": 1}
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(
        AutoConfig.for_model(kind, **(shape | SHAPES[kind] | config))
    ).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    if dtype == torch.float64 and kind != "bert":
        in_double_precision(model)
    return model.eval()


def own_scores(model, rows):
    """(2B,) of sequences run alone, chosen first, by the model's own forward."""
    sequences = [[*row.get("prompt_ids", []), *row[side]] for side in ("chosen_ids", "rejected_ids") for row in rows]
    return torch.stack([model(input_ids=torch.tensor([ids])).logits[0, 0] for ids in sequences])
