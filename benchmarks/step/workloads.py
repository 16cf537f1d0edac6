"""What the train-step benchmark runs: shapes of data, shapes of models, and which go together on which device."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def hh_lengths() -> list[Lengths]:
    with open(LENGTHS) as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))
    return [(int(line["prompt"]), int(line["chosen"]), int(line["rejected"])) for line in lines]


def lengths(part: Part) -> list[Lengths]:
    shape = SHAPES[part.shape]
    wanted = hh_lengths()[: part.pairs] if shape.lengths is None else [shape.lengths] * part.pairs
    return [tuple(max(2, int(length * part.scale)) for length in row) for row in wanted]


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
