"""Tiny random models and rows, made on the spot."""

import json
import random

import torch

VOCABULARY = 97


def device_for(impl):
    """Where an implementation is tested: Triton on a GPU if there is one, else in its interpreter on the CPU."""
    return "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"


def tiny_model(kind="llama", dtype=torch.float32, seed=0, **config):
    """A two-layer model with weights large enough that a mistake moves its log-probs."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    shape = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        options = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        }
        made = LlamaConfig(**shape, **(options | config))
    else:
        made = GPT2Config(**shape, **({"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256} | config))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(made).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0.0, 0.2)
    return (in_double_precision(model) if dtype == torch.float64 else model).eval()


def in_double_precision(model):
    """The model in float64, its norms too: transformers' RMS norms work in float32 whatever they get."""
    model = model.double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, torch.nn.RMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return model


def random_rows(count, seed=0, prompt=(1, 12), answer=(1, 9)):
    """Tokenized rows of random lengths; lengths are (lowest, highest)."""
    draw = random.Random(seed)

    def ids(bounds):
        return [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(*bounds))]

    return [{"prompt_ids": ids(prompt), "chosen_ids": ids(answer), "rejected_ids": ids(answer)} for _ in range(count)]


def text_rows(count):
    """Rows of words that `word_tokenizer` knows."""
    words = ["a", "b", "c", "d", "e", "hello"]
    return [
        {"prompt": f"why {words[i % 6]} {words[i // 6 % 6]}", "chosen": f" yes {words[i % 5]}", "rejected": " no no"}
        for i in range(count)
    ]


def write_rows(path, rows):
    """A .jsonl file of them; its path, as a command takes it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def word_tokenizer(chat=False):
    """A tokenizer of a few words, with or without a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "user", "assistant", ":", "a", "b", "c", "d", "e", "yes", "no", "why", "hello"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    if chat:
        fast.chat_template = (
            "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
        )
    return fast


def naive_sequence_logps(model, rows):
    """Sum of the completion's log-probs of every sequence, chosen first, each run alone and unpadded."""
    sums = []
    for side in ("chosen_ids", "rejected_ids"):
        for row in rows:
            prompt, completion = list(row["prompt_ids"]), list(row[side])
            ids = torch.tensor([prompt + completion])
            logits = model(input_ids=ids, use_cache=False).logits[0]
            logps = torch.log_softmax(logits, -1)[:-1].gather(1, ids[0, 1:, None]).squeeze(1)
            sums.append(logps[max(0, len(prompt) - 1) :].sum())
    return torch.stack(sums)
