"""A DPO step (forward, backward) with cached reference: fastdpo's packings against a plain padded step.

    python benchmarks/step/packing.py           on a GPU: a random 1B Llama in bfloat16, four shapes of data
    python benchmarks/step/packing.py --tiny    a check of the script itself, on any device

The plain step is what a script without fastdpo does: one padded batch, all logits, log_softmax. Losses must agree in
the same run, or no time is given.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from common import write_result  # noqa: E402
from timing import interleaved, peak_extra_bytes  # noqa: E402

import fastdpo  # noqa: E402
from fastdpo.models import verify_packing  # noqa: E402

PACKINGS = ("prefix", "varlen", "padded")


def shapes(pairs: int, scale: float) -> dict[str, list[tuple[int, int, int]]]:
    """(prompt, chosen, rejected) lengths in tokens."""
    with open(ROOT / "benchmarks" / "data" / "hh_rlhf_harmless_test.csv") as file:
        lines = list(csv.DictReader(line for line in file if not line.startswith("#")))[:pairs]
    hh = [(int(line["prompt"]), int(line["chosen"]), int(line["rejected"])) for line in lines]
    made = {
        "hh": hh,
        "instruct": [(190, 320, 270)] * pairs,
        "long prompt": [(2000, 100, 100)] * pairs,
        "long answer": [(100, 1500, 1500)] * pairs,
    }
    return {name: [tuple(max(2, int(x * scale)) for x in row) for row in rows] for name, rows in made.items()}


def plain_step(model: Any, batch: Any, refs: torch.Tensor) -> torch.Tensor:
    """-logsigmoid(beta * delta) from a padded batch, in the open."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits[:, :-1]
    logps = torch.log_softmax(logits.float(), -1).gather(-1, batch.input_ids[:, 1:, None]).squeeze(-1)
    flat = torch.zeros(batch.input_ids.numel(), device=logps.device)
    flat[batch.target_rows] = 1.0
    chosen, rejected = (logps * flat.view_as(batch.input_ids)[:, :-1]).sum(1).view(2, -1)
    margin = 0.1 * ((chosen - rejected) - (refs[: len(chosen)] - refs[len(chosen) :]))
    return -torch.nn.functional.logsigmoid(margin).mean()


def measure(model: Any, lengths: list[tuple[int, int, int]], device: torch.device, repeats: int) -> dict[str, Any]:
    draw = random.Random(0)
    vocabulary = model.config.vocab_size
    rows = [
        dict(
            zip(
                ("prompt_ids", "chosen_ids", "rejected_ids"),
                ([draw.randrange(vocabulary) for _ in range(count)] for count in row),
                strict=True,
            )
        )
        for row in lengths
    ]
    batches = {name: fastdpo.PreferenceCollator(packing=name)(rows).to(device) for name in PACKINGS}
    with torch.no_grad():
        refs = fastdpo.sequence_logps(model, batches["padded"])

    def step(name: str) -> torch.Tensor:
        model.zero_grad()
        if name == "plain":
            loss = plain_step(model, batches["padded"], refs)
        else:
            loss = fastdpo.batch_loss(model, batches[name], refs, token_metrics=False).loss
        loss.backward()
        return loss.detach()

    names = ("plain", *PACKINGS)
    losses = {name: step(name).item() for name in names}
    agree = max(losses.values()) - min(losses.values()) <= 0.05
    seconds = interleaved({name: (lambda m=name: step(m)) for name in names}, repeats=repeats, warmup=1)
    return {
        "pairs": len(lengths),
        "numbers_agree": agree,
        "losses": losses,
        "variants": {
            name: {
                "seconds_a_pair": seconds[name] / len(lengths) if agree else None,
                "speedup_over_plain": seconds["plain"] / seconds[name] if agree else None,
                "tokens": batches["padded" if name == "plain" else name].num_tokens,
                "extra_bytes": peak_extra_bytes(lambda m=name: step(m)),
            }
            for name in names
        },
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    from transformers import AutoModelForCausalLM, LlamaConfig

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.tiny or device.type == "cpu":
        config = LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                             num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
        dtype, pairs, scale, repeats = torch.float32, 4, 0.05, 2
    else:
        config = LlamaConfig(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                             num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True)  # fmt: skip
        dtype, pairs, scale, repeats = torch.bfloat16, 8, 1.0, 5
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device, dtype)
    for packing in PACKINGS:
        verify_packing(model, packing)
    result = {"parameters": model.num_parameters(), "dtype": str(dtype), "shapes": {}}
    for name, lengths in shapes(pairs, scale).items():
        result["shapes"][name] = measured = measure(model, lengths, device, repeats)
        print(f"\n{name}: {measured['pairs']} pairs, numbers agree: {measured['numbers_agree']}")
        for variant, row in measured["variants"].items():
            print(f"  {variant:8}", {key: value if value is None else round(value, 4) for key, value in row.items()})
    if options.results:
        print("written to", write_result("tiny-packing" if options.tiny else "packing", result, options.results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
