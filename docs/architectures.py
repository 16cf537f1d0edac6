"""Writes docs/architectures.md; with --check, only says whether it is up to date.

Every row is found by running: the tiny models of tests/zoo.py through the trainer's choice of a packing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import transformers  # noqa: E402
import zoo  # noqa: E402

from fastdpo.packing.collator import PACKINGS  # noqa: E402
from fastdpo.types import UserError  # noqa: E402
from fastdpo.verify import verify_packing  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
INTRODUCTION = """# Architectures

fastdpo runs a batch in one of three ways. `prefix`: one row, in which tokens that sequences have in common stand once.
`varlen`: one row, every sequence whole. `padded`: a rectangle, as other libraries run it. All three give the log-probs
that each sequence has alone. The trainer's `packing="auto"` takes the first one that the model allows. It reads no
table: before training it compares your own model, packed, with its own logits, and either falls back with a message
that says why, or, where you asked for one packing, refuses.

`python docs/architectures.py` made this table by the same comparison of tiny random models (`tests/zoo.py`), with
transformers {version}. For every row `tests/models/test_zoo.py` holds that log-probs and all gradients equal those of
separate, unpadded sequences, to 1e-12 in float64. Where rotary frequencies follow the longest sequence of a batch
(`dynamic`, `longrope`), that holds up to the length from which they do, and longer sequences are refused.

| architecture | class | packing | attention | positions | why not `prefix` |
|---|---|---|---|---|---|
"""


def auto_packing(architecture: zoo.Architecture) -> tuple[str, str]:
    """What the trainer's packing="auto" takes, and what it says against the first ("" where it takes that)."""
    refusals = []
    for packing in PACKINGS:
        try:
            verify_packing(zoo.make(architecture), packing)
        except UserError as error:
            refusals.append(str(error))
            continue
        return packing, refusals[0] if refusals else ""
    return "none", refusals[0]


def attention(model: Any) -> str:
    config = model.config
    names = [name for name, _ in model.named_parameters()]
    kinds = {*(getattr(config, "layer_types", None) or []), *getattr(config, "attention_layers", [])}
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    grouped = any(getattr(module, "num_key_value_groups", 1) > 1 for module in model.modules())
    found = {
        "grouped queries": grouped or getattr(config, "multi_query", False),
        "latent keys (MLA)": hasattr(config, "kv_lora_rank"),
        "window": kinds & {"sliding_attention", "local"} if kinds else window,
        "chunks": "chunked_attention" in kinds,
        "softcap": getattr(config, "attn_logit_softcapping", None),
        "sinks": any(name.endswith("sinks") for name in names),
        "experts": any("experts" in name for name in names),
    }
    return ", ".join(name for name, there in found.items() if there) or "–"


def positions(model: Any) -> str:
    config = model.config
    modules = " ".join({type(module).__name__ for module in model.modules()})
    names = " ".join(name for name, _ in model.named_parameters())
    if config.model_type in ("bloom", "mpt") or getattr(config, "alibi", False):
        return "ALiBi"
    if "Rotary" in modules or hasattr(config, "rotary_dim"):
        return "rotary"
    if re.search("wpe|embed_positions|positions_embed", names):
        return "learned"
    return "sinusoidal" if config.model_type in ("ctrl", "xglm") else "none"


def why(architecture: zoo.Architecture, refusal: str) -> str:
    """The refusal without the model's name before it and the advice behind it; what is known of the architecture."""
    said = refusal.partition(": ")[2] or refusal
    said = re.sub(r"only (\d+ of) its (\d+ layers) run attention.*", r"\1 \2 call transformers' attention", said)
    said = re.sub(r" by [-+.\de]+ nats a token", "", re.sub("off by .*", "other log-probs", said)).rstrip(".")
    said = re.split(r"; |\. |: ", said)[0]
    return ": ".join(filter(None, (architecture.reason, said)))


def row(architecture: zoo.Architecture) -> str:
    packing, refusal = auto_packing(architecture)
    model = zoo.make(architecture)
    cells = (
        architecture.name,
        type(model).__name__,
        f"`{packing}`",
        attention(model),
        positions(model),
        why(architecture, refusal),
    )
    return f"| {' | '.join(cells)} |"


def documented() -> dict[str, tuple[str, str]]:
    """Class and packing of each architecture on the page."""
    rows = re.findall(r"^\| (.+?) \| (\w+) \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    return {name: (kind, packing) for name, kind, packing in rows}


def main() -> int:
    transformers.logging.set_verbosity_error()
    rows = [row(architecture) for architecture in zoo.ARCHITECTURES]
    text = INTRODUCTION.format(version=transformers.__version__) + "\n".join(rows) + "\n"
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
        return 0
    if PAGE.exists() and PAGE.read_text() == text:
        return 0
    print("docs/architectures.md is not what `python docs/architectures.py` writes", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
