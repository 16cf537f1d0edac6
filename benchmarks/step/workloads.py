"""What the benchmarks of whole models run: shapes of data, shapes of models, and which go together on which device."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_LENGTH = 512  # of a sequence in comparisons with TRL; none of the pairs taken is longer
LENGTHS = Path(__file__).resolve().parents[1] / "data" / "hh_rlhf_harmless_test.csv"

Lengths = tuple[int, int, int]  # of prompt, chosen and rejected, in tokens


@dataclass(frozen=True)
class Shape:
    """Pairs of the same lengths; None: those of HH-RLHF, in file order. `prompt_pairs` of them share each prompt."""

    lengths: Lengths | None
    prompt_pairs: int = 1


SHAPES = {
    "hh": Shape(None),
    "instruct": Shape((190, 320, 270)),
    "long prompt": Shape((2000, 100, 100)),
    "long answer": Shape((100, 1500, 1500)),
    "8 completions": Shape((400, 250, 250), prompt_pairs=4),
    "full": Shape((190, 320, 270)),  # of `instruct`, as many as fill the token budget
}
FULL_TOKENS = 16384  # in a packed row, each prompt once


def llama(
    vocabulary: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool = False
) -> dict[str, Any]:
    """Of transformers' LlamaConfig. With more positions than any shape needs: they cost nothing."""
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 1 << 17,
    }


MODELS = {
    "tiny": llama(500, 64, 128, 2, 4, 2),
    "135M": llama(49152, 576, 1536, 30, 9, 3, tied=True),  # SmolLM2-135M
    "1B": llama(128256, 2048, 8192, 16, 32, 8, tied=True),  # Llama 3.2 1B
    "8B": llama(128256, 4096, 14336, 32, 32, 8),  # Llama 3.1 8B
}


@dataclass(frozen=True)
class Part:
    model: str
    shape: str
    pairs: int
    scale: float = 1.0  # of the lengths

    def __str__(self) -> str:
        return f"{self.model}, {self.shape}, {self.pairs} pair{'s'[: self.pairs - 1]}"


# In the order in which they run, in case the time runs out. A GPU gets more pairs of the short shapes, a CPU as many as
# ten minutes on two cores allow for.
PLANS = {
    "tiny": [Part("tiny", shape, 8, 0.05) for shape in SHAPES if shape != "full"],
    "cpu": [Part("135M", "hh", 4), Part("135M", "instruct", 1)],
    "cuda": [
        Part("1B", "hh", 32),
        Part("1B", "instruct", 16),
        Part("1B", "long prompt", 8),
        Part("1B", "long answer", 8),
        Part("1B", "8 completions", 16),
        Part("8B", "hh", 16),
        Part("8B", "instruct", 8),
        Part("8B", "full", round(FULL_TOKENS / sum(SHAPES["full"].lengths or ()))),
    ],
}

# Of the reference pass. On a CPU so many pairs of HH-RLHF lengths; on a GPU as many as a minute allows for, those of
# `instruct` in full passes of 32768 tokens.
REFERENCE_PAIRS = 64
REFERENCE_PLANS = {
    "tiny": [Part("tiny", "hh", 8, 0.1), Part("tiny", "instruct", 8, 0.05)],
    "cuda": [Part("1B", "hh", 512), Part("1B", "instruct", 126), Part("8B", "hh", 256), Part("8B", "instruct", 84)],
}


@dataclass(frozen=True)
class TrainerPart:
    """Whole trainers on pairs of HH-RLHF lengths.

    settings: "default", as the trainers' configs have them (layers checkpointed, autocast), or "fastest", with neither
    """

    model: str
    pairs: int  # a batch
    settings: str
    scale: float = 1.0  # of the lengths

    def __str__(self) -> str:
        return f"{self.model}, {self.pairs} pairs a batch, {self.settings} settings"


TRAINER_PLANS = {
    "tiny": [TrainerPart("tiny", 2, "default", 0.1), TrainerPart("tiny", 3, "fastest", 0.1)],
    "cuda": [TrainerPart("1B", pairs, settings) for settings in ("default", "fastest") for pairs in (8, 32, 4)],
}


def hh_lengths() -> list[Lengths]:
    with open(LENGTHS) as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return [(int(line["prompt"]), int(line["chosen"]), int(line["rejected"])) for line in lines]


def lengths(part: Part) -> list[Lengths]:
    shape = SHAPES[part.shape]
    wanted = hh_lengths()[: part.pairs] if shape.lengths is None else [shape.lengths] * part.pairs
    return scaled(wanted, part.scale)


def scaled(wanted: list[Lengths], scale: float) -> list[Lengths]:
    return [tuple(max(2, int(length * scale)) for length in row) for row in wanted]


def rows(part: Part, vocabulary: int) -> list[dict[str, list[int]]]:
    """Pairs of random tokens, as PreferenceCollator takes them; the same ones every time."""
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return draw.choices(range(vocabulary), k=count)

    made: list[dict[str, list[int]]] = []
    for number, (prompt, chosen, rejected) in enumerate(lengths(part)):
        shared = number % SHAPES[part.shape].prompt_pairs
        prompt_ids = made[-1]["prompt_ids"] if shared else tokens(prompt)
        made.append({"prompt_ids": prompt_ids, "chosen_ids": tokens(chosen), "rejected_ids": tokens(rejected)})
    return made


def text_rows(pairs: int, vocabulary: int, scale: float = 1.0) -> list[dict[str, str]]:
    """The first pairs of HH-RLHF as text of one random word a token, for `word_tokenizer`.

    Everybody tokenizes them to the same ids; the last token of an answer is the end of text, which is not written.
    """
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"t{draw.randrange(3, vocabulary)}" for _ in range(count))

    return [
        {"prompt": words(prompt), "chosen": " " + words(chosen - 1), "rejected": " " + words(rejected - 1)}
        for prompt, chosen, rejected in scaled(hh_lengths()[:pairs], scale)
    ]


def word_tokenizer(vocabulary: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"t{i}" for i in range(3, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
