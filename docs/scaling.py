"""Writes the tables of docs/scaling.md from the formulas below; with --check, only says whether they are up to date.

Nothing here is measured: bytes, FLOPs and seconds follow from the shape of the model, the data sheet of the machine and
the assumptions, each of which has its name here. Sizes are in bytes, times in seconds, GB are 10^9 bytes.
"""

from __future__ import annotations

import math
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastdpo.trainer.sampling import BalancedSampler  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"
GB, BF16, FP32, HOUR = 1e9, 2, 4, 3600.0


@dataclass(frozen=True)
class Model:
    """A Llama: D, F, layers, heads of D/heads, key/value heads, V; head and embedding untied."""

    hidden: int = 8192
    intermediate: int = 28672
    layers: int = 80
    heads: int = 64
    kv_heads: int = 8
    vocabulary: int = 128256

    @property
    def kv(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer(self) -> int:
        projections = 2 * self.hidden * (self.hidden + self.kv) + 3 * self.hidden * self.intermediate
        return projections + 2 * self.hidden

    @property
    def head(self) -> int:
        return self.hidden * self.vocabulary

    @property
    def backbone(self) -> int:
        """Parameters that every token is multiplied by."""
        return self.layers * self.layer

    @property
    def parameters(self) -> int:
        return self.backbone + 2 * self.head + self.hidden

    def lora(self, rank: int) -> int:
        """Of adapters on all seven projections of each layer."""
        d, f = self.hidden, self.intermediate
        return self.layers * rank * (2 * (d + d) + 2 * (d + self.kv) + 3 * (d + f))


@dataclass(frozen=True)
class Cluster:
    """Data sheet of an H100 SXM (an H200 has its arithmetic), and what is assumed of it."""

    gpus: int = 1000
    node: int = 8
    flops: float = 989e12  # dense bfloat16
    nvlink: float = 450e9  # bytes/s a GPU in one direction
    nic: float = 50e9  # bytes/s a GPU in one direction: 400 Gb/s
    efficiency: float = 0.8  # assumed share of either that a large collective reaches
    hop: float = 5e-6  # assumed latency of one step of a ring
    mfu: float = 0.4  # assumed share of `flops` that 6 FLOPs a weight and token make up in training
    mfu_forward: float = 0.5  # the same of 2 FLOPs a weight and token, forward only


@dataclass(frozen=True)
class Pair:
    """Mean tokens of a prompt and of its completions."""

    prompt: int
    completions: tuple[int, ...]

    @property
    def shared(self) -> int:
        return self.prompt + self.targets

    @property
    def unshared(self) -> int:
        return len(self.completions) * self.prompt + self.targets

    @property
    def targets(self) -> int:
        return sum(self.completions)

    @property
    def saved(self) -> float:
        return (len(self.completions) - 1) * self.prompt / self.unshared

    @property
    def attended(self) -> float:
        """Query-key pairs under the causal mask."""
        return self.prompt**2 / 2 + sum(c * (self.prompt + c / 2) for c in self.completions)


M, C, PAIR = Model(), Cluster(), Pair(190, (320, 270))
SHAPES = {
    "HH-RLHF, harmless": Pair(149, (40, 50)),
    "instruct": PAIR,
    "long prompt": Pair(2000, (100, 100)),
    "long answer": Pair(100, (1500, 1500)),
    "8 completions": Pair(400, (250,) * 8),
}

# Memory


def states(weight: int, gradient: int, moments: int, shards: int, model: Model = M) -> float:
    """Bytes a GPU: weights, gradients and both moments of AdamW, each cut into so many shards."""
    return model.parameters * (weight + gradient + moments) / shards


def gathered(model: Model = M) -> float:
    """Bytes that FSDP2 holds whole beside the shards, at the worst moment, the backward of a layer: its bfloat16
    weights, those of the layer that is fetched ahead, the gradients of one layer and those of the one on its way."""
    return 4 * model.layer * BF16


def checkpointed(tokens: int, model: Model = M) -> float:
    """Bytes of the layers' inputs in bfloat16, which checkpointing keeps."""
    return tokens * model.layers * model.hidden * BF16


def layer_activations(tokens: int, model: Model = M) -> float:
    """Bytes that one layer keeps for its backward.

    In bytes a token: both norms, the float32 copy and the bfloat16 product, 12D; what the projections of attention and
    of the MLP take in, 4D; queries and the output of attention, 4D, keys and values, 4KV; of the MLP gate, SiLU of the
    gate, up, and their product, 8F.
    """
    return tokens * (20 * model.hidden + 4 * model.kv + 8 * model.intermediate)


def head_memory(targets: int, budget: float, model: Model = M) -> dict[str, float]:
    """Bytes of the head: its gathered weight, the sum of dW in float32 and its bfloat16 copy, hidden states and their
    gradient of the targets, the tile."""
    return {
        "weight": model.head * BF16,
        "dW": model.head * (FP32 + BF16),
        "hidden": 2 * targets * model.hidden * BF16,
        "tile": min(budget, targets * model.vocabulary * BF16),
    }


def whole_logits(tokens: int, model: Model = M) -> float:
    """Bytes of logits of all tokens in bfloat16, a float32 copy and its gradient: what is not there."""
    return tokens * model.vocabulary * (BF16 + 2 * FP32)


# Arithmetic


def training_flops(pair: Pair = PAIR, model: Model = M, a_weight: int = 6, head: int = 6) -> float:
    """FLOPs of a pair: 6 a weight and token (8 where activations are formed again), of the head `head` a weight and
    target; attention 4D a layer and query-key pair forward, 2.5 times that backward."""
    times = 3.5 if a_weight == 6 else 4.5
    attention = times * 4 * model.layers * model.hidden * pair.attended
    return a_weight * model.backbone * pair.shared + head * model.head * pair.targets + attention


def forward_flops(pair: Pair = PAIR, model: Model = M) -> float:
    attention = 4 * model.layers * model.hidden * pair.attended
    return 2 * (model.backbone * pair.shared + model.head * pair.targets) + attention


def pair_seconds(mfu: float = C.mfu) -> float:
    """Of one pair on one GPU. The MFU counts 6 FLOPs a weight and token: what is formed again is not in it."""
    return training_flops() / (mfu * C.flops)


def token_seconds(mfu: float = C.mfu) -> float:
    return pair_seconds(mfu) / PAIR.shared


# Communication


def collective(size: float, gpus: int, messages: int, cluster: Cluster = C) -> float:
    """Seconds of gathering `size` bytes from, or reducing them over, so many GPUs, in so many messages.

    As many rings as a node has GPUs, each with 1/8 of the data and a network card of its own: all of `size` comes in
    over the node's cards together, and over each GPU's NVLink. A ring of n takes n - 1 steps.
    """
    share = (gpus - 1) / gpus
    inside = size * share / cluster.nvlink
    outside = size * share / (cluster.node * cluster.nic) if gpus > cluster.node else 0.0
    return max(inside, outside) / cluster.efficiency + messages * (gpus - 1) * cluster.hop


@dataclass(frozen=True)
class Pass:
    """Seconds of communication of one forward and backward."""

    gather: float  # of all weights, once; forward and backward each do it
    reduce: float  # of all gradients over the shards
    replicas: float  # of the sharded gradients over the replicas

    @property
    def total(self) -> float:
        return 2 * self.gather + self.reduce + self.replicas

    def tokens_to_hide(self, mfu: float = C.mfu) -> int:
        """Tokens of a pass a GPU from which arithmetic takes as long as communication, forward and backward each.

        With checkpointing a quarter of the time is the forward's (2 of 8 FLOPs).
        """
        whole = token_seconds(mfu)
        forward = self.gather / (whole / 4)
        backward = (self.gather + self.reduce + self.replicas) / (whole * 3 / 4)
        return math.ceil(max(forward, backward))


def sharded_pass(shards: int, model: Model = M, cluster: Cluster = C) -> Pass:
    """Of FSDP2 over `shards` GPUs, replicated over the others. Weights and gradients travel in bfloat16."""
    size, messages = model.parameters * BF16, model.layers + 2
    once = collective(size, shards, messages)
    copies = cluster.gpus // shards
    exchanged = 2 * size / shards * (copies - 1) / copies  # an all-reduce by each GPU over its own card
    replicas = exchanged / cluster.nic / cluster.efficiency + 2 * messages * (copies - 1) * cluster.hop
    return Pass(once, once, replicas if copies > 1 else 0.0)


# The reference

ROW_BYTES, SUM_ROW_BYTES, INDEX_BYTES, INDEX_PEAK = 33, 28, 36, 141  # tests/docs/test_scaling_page.py holds them
PASS_TOKENS, SHARD_PASSES, SHARD_SECONDS, WINDOW_ROWS = 32768, 16, 60.0, 16384  # of fastdpo.reference


def shard_bytes(sequences: float, tokens: float, per_token: bool = True) -> float:
    return sequences * (tokens * FP32 + ROW_BYTES) if per_token else sequences * SUM_ROW_BYTES


def precompute_seconds(pairs: float) -> float:
    """GPU seconds."""
    return pairs * forward_flops() / (C.mfu_forward * C.flops)


def shard_count(pairs: float, slices: int, rows: float) -> float:
    """Files that so many processes write which share `rows` rows: at the end of a window of 16,384 rows read, and
    within it every 16 passes or every minute."""
    pass_pairs = PASS_TOKENS / PAIR.shared
    passes = min(SHARD_PASSES, math.ceil(SHARD_SECONDS / precompute_seconds(pass_pairs)))
    own = min(WINDOW_ROWS, rows) / slices
    windows = pairs / own
    return windows * math.ceil(own / (pass_pairs * passes))


# Balance


def imbalance(pairs: int, spread: float = 0.6, steps: int = 3) -> tuple[float, float]:
    """Tokens of the fullest GPU over the mean, of `pairs` pairs each: rows as they come, and dealt out evenly.

    Lengths are drawn from a log-normal distribution with this standard deviation over mean.
    """
    draw, sigma = random.Random(0), math.sqrt(math.log(1 + spread**2))
    count = C.gpus * pairs * steps
    lengths = np.array([draw.lognormvariate(0.0, sigma) for _ in range(count)])
    dealt = BalancedSampler(range(count), lengths, batch_size=pairs, processes=C.gpus)
    orders = (np.arange(count), np.fromiter(dealt, int, count))
    plain, even = (lengths[order].reshape(steps, C.gpus, pairs).sum(2) for order in orders)
    return tuple(float((each.max(1) / each.mean(1)).mean()) for each in (plain, even))  # type: ignore[return-value]


# Checkpoints and failures

MTBF_GPU_HOURS = 16384 * 54 * 24 / 419  # arXiv:2407.21783, 3.3.4: 419 unexpected interruptions in 54 days


def mean_time_between_failures(gpus: int) -> float:
    return MTBF_GPU_HOURS / gpus * HOUR


def best_interval(saving: float, between: float) -> float:
    """Young 1974: seconds between checkpoints that lose the least."""
    return math.sqrt(2 * saving * between)


def lost_share(interval: float, saving: float, between: float, restart: float) -> float:
    """Of the time: saving, what is done twice after a failure, and starting again."""
    return saving / interval + (interval / 2 + restart) / between


# Tables


def table(head: str, rows: list[tuple[object, ...]]) -> str:
    names = head.split("|")
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *[[str(cell) for cell in row] for row in rows]]
    return "".join(f"| {' | '.join(cell.strip() for cell in line)} |\n" for line in lines)


def gb(value: float) -> str:
    return f"{value / GB:,.0f}" if value >= 99.5 * GB else f"{value / GB:.1f}" if value >= GB else f"{value / GB:.2f}"


def parameters_table() -> str:
    rows = {
        "one layer": M.layer, "80 layers: the backbone": M.backbone, "embedding": M.head, "head": M.head,
        "final norm": M.hidden, "all": M.parameters,
    }  # fmt: skip
    return table("of the model|parameters|bf16, GB", [(name, f"{n:,}", gb(n * BF16)) for name, n in rows.items()])


LAYOUTS = {"full shard over 1,000": 1000, "40 x 25 replicas": 40, "8 x 125 replicas": 8, "whole on each": 1}


def states_table() -> str:
    kinds = ((4, 4, 8), (4, 4, 2), (2, 2, 4))
    rows = [(name, shards, *(gb(states(*kind, shards)) for kind in kinds)) for name, shards in LAYOUTS.items()]
    head = "weights, gradients, AdamW, GB a GPU|shards|fp32 (4+4+8 B)|fp32, 8-bit AdamW (4+4+2 B)|bf16 (2+2+4 B)"
    return table(head, rows)


TOKENS = (2048, 8192, 16384)


def activations_table() -> str:
    parts = {
        "kept with checkpointing: inputs of the layers": checkpointed,
        "and one layer, formed again": layer_activations,
        "kept without checkpointing": lambda tokens: M.layers * layer_activations(tokens),
        "not there: logits of all tokens": whole_logits,
    }
    rows = [(name, *(gb(part(tokens)) for tokens in TOKENS)) for name, part in parts.items()]
    return table("GB, tokens of the row:|" + "|".join(f"{t:,}" for t in TOKENS), rows)


BUDGET = float(1 << 30)


def memory_parts(shards: int, tokens: int, kind: tuple[int, int, int] = (4, 4, 8)) -> dict[str, float]:
    """All of a GPU, at the worst moment of a step."""
    head = head_memory(round(tokens * PAIR.targets / PAIR.shared), BUDGET)
    return {
        "weights, gradients, AdamW": states(*kind, shards),
        "gathered layers and their gradients": gathered() if shards > 1 else 0.0,
        "embedding and head, gathered": 2 * head["weight"] if shards > 1 else 0.0,
        "dW of the head": head["dW"],
        "hidden states of targets, tile": head["hidden"] + head["tile"],
        "inputs of the layers": checkpointed(tokens),
        "one layer, formed again": layer_activations(tokens),
    }


def memory_table() -> str:
    columns = [memory_parts(1000, 8192), memory_parts(1000, 16384), memory_parts(40, 16384),
               memory_parts(8, 8192, (2, 2, 4))]  # fmt: skip
    rows: list[tuple[object, ...]] = [(name, *(gb(column[name]) for column in columns)) for name in columns[0]]
    rows.append(("**sum**", *(f"**{gb(sum(column.values()))}**" for column in columns)))
    return table("GB a GPU|1,000 shards, 8,192 tokens|1,000, 16,384|40, 16,384|8, bf16 states, 8,192", rows)


def step_table() -> str:
    rows = []
    for pairs in (1, 4, 10, 21, 64):
        tokens, step = pairs * PAIR.shared, pairs * C.gpus
        fits = max(1, 16384 // PAIR.shared)
        passes = math.ceil(pairs / fits)
        compute = pairs * pair_seconds()
        times = [max(compute, passes * sharded_pass(shards).total) for shards in (1000, 40)]
        seconds = (f"{time:.1f}" for time in times)
        rows.append((f"{step:,}", pairs, f"{tokens:,}", passes, f"{compute:.1f}", *seconds, f"{1e6 / step:,.0f}"))
    head = "pairs a step|a GPU|tokens a GPU|passes|arithmetic, s|step, 1,000 shards, s|step, 40 shards, s"
    return table(head + "|steps in 1M pairs", rows)


def flops_table() -> str:
    parts = {
        "backbone, 6 a weight and token": 6 * M.backbone * PAIR.shared,
        "formed again by checkpointing, 2": 2 * M.backbone * PAIR.shared,
        "attention scores, forward and backward": 14 * M.layers * M.hidden * PAIR.attended,
        "head, 6NDV": 6 * M.head * PAIR.targets,
        "head over all tokens, 8 a weight, prompts twice (not there)": 8 * M.head * PAIR.unshared,
        "reference in every step, 2 a weight (not there)": forward_flops(),
    }
    return table("of a pair|TFLOP", [(name, f"{value / 1e12:.1f}") for name, value in parts.items()])


def speed_table() -> str:
    rows = []
    for mfu in (0.2, 0.3, 0.4, 0.5):
        each = pair_seconds(mfu)
        hours = (f"{pairs * each / C.gpus / HOUR:.2f}" for pairs in (1e6, 1e7))
        rows.append((f"{mfu:.0%}", f"{each:.2f}", f"{1 / token_seconds(mfu):,.0f}", f"{C.gpus / each:,.0f}", *hours))
    return table("MFU|s a pair and GPU|tokens/s a GPU|pairs/s of 1,000|1M pairs, h|10M pairs, h", rows)


def communication_table() -> str:
    rows = []
    for shards in (1000, 200, 40, 8):
        each = sharded_pass(shards)
        parts = (f"{value:.2f}" for value in (each.gather, each.reduce, each.replicas, each.total))
        rows.append((f"{shards} x {C.gpus // shards}", *parts, *(f"{each.tokens_to_hide(m):,}" for m in (0.4, 0.2))))
    head = "shards x replicas|gather, s (twice)|reduce, s|over replicas, s|a pass, s"
    return table(head + "|tokens that hide it, MFU 40%|20%", rows)


def reference_table() -> str:
    rows = []
    for pairs in (1e6, 1e7, 1e8):
        sequences, tokens = 2 * pairs, PAIR.targets / 2
        sizes = [shard_bytes(sequences, tokens), shard_bytes(sequences, tokens, False)]
        hours = precompute_seconds(pairs) / HOUR
        rows.append((
            f"{pairs:,.0f}", *(gb(size) for size in sizes), gb(sequences * INDEX_BYTES), gb(sequences * INDEX_PEAK),
            f"{hours:,.0f}", f"{hours / C.gpus:.2f}",
        ))  # fmt: skip
    head = "pairs|values of tokens, GB|sums only, GB|index, GB|index, peak, GB|GPU hours|hours on 1,000"
    return table(head, rows)


def files_table() -> str:
    rows = []
    for pairs in (1e6, 1e7, 1e8):
        one_file, cut = shard_count(pairs, 1000, pairs), shard_count(pairs, 8, pairs / 125)
        rows.append((f"{pairs:,.0f}", f"{one_file:,.0f}", f"{2 * pairs / one_file:,.0f}",
                     f"{cut:,.0f}", f"{2 * pairs / cut:,.0f}"))  # fmt: skip
    head = "pairs|1,000 slices of one file: shards|sequences in each|a file a node, 8 slices: shards"
    return table(head + "|sequences in each", rows)


def sharing_table() -> str:
    rows = [
        (name, pair.prompt, f"{len(pair.completions)} x {pair.targets / len(pair.completions):.0f}",
         f"{pair.unshared:,}", f"{pair.shared:,}", f"{pair.saved:.0%}", f"{1 / (1 - pair.saved):.2f}")
        for name, pair in SHAPES.items()
    ]  # fmt: skip
    return table("shape|P|K x C|unshared|shared|saved|unshared / shared", rows)


def balance_table() -> str:
    rows = [(pairs, *(f"{value:.2f}" for value in imbalance(pairs))) for pairs in (1, 4, 21)]
    return table("pairs a GPU and step|rows as they come|batch_rebalance", rows)


def checkpoint_table() -> str:
    between, restart, rows = mean_time_between_failures(C.gpus), 600.0, []
    for name, size, bandwidth in (
        ("sharded, fp32 states, 100 GB/s", 12 * M.parameters, 100e9),
        ("sharded, fp32 states, 10 GB/s", 12 * M.parameters, 10e9),
        ("gathered, one writer of 2 GB/s", 12 * M.parameters, 2e9),
        ("sharded, bf16 states, 10 GB/s", 6 * M.parameters, 10e9),
        ("LoRA, rank 16, one writer of 2 GB/s", 12 * M.lora(16), 2e9),
    ):
        saving = size / bandwidth
        interval = best_interval(saving, between)
        share = lost_share(interval, saving, between, restart)
        rows.append((name, gb(size), f"{saving:.1f}", f"{interval / 60:.0f}", f"{share:.2%}"))
    return table("checkpoint|GB|s|best interval, min|lost", rows)


NF4 = 0.5 + 0.127 / 8  # bytes a weight: four bits, and the scales, themselves in eight bits, of blocks of 64


def lora_table() -> str:
    adapters, tokens = M.lora(16), 8192
    head = head_memory(round(tokens * PAIR.targets / PAIR.shared), BUDGET)
    rest = checkpointed(tokens) + layer_activations(tokens) + head["hidden"] + head["tile"]
    rows = []
    for name, base, gather in (
        ("LoRA, base bf16, 1,000 shards", M.parameters * BF16 / 1000, 3 * M.layer * BF16 + 2 * M.head * BF16),
        ("LoRA, base bf16, 8 shards", M.parameters * BF16 / 8, 3 * M.layer * BF16 + 2 * M.head * BF16),
        ("LoRA, base bf16, whole", M.parameters * BF16, 0.0),
        ("QLoRA, base NF4, whole", M.backbone * NF4 + 2 * M.head * BF16, M.layer * BF16),
    ):
        states_ = 16.0 * adapters / (1000 if "1,000" in name else 8 if "8 shards" in name else 1)
        parts = (base, states_, gather, rest)
        rows.append((name, *(gb(part) for part in parts), gb(sum(parts))))
    return table("GB a GPU, 8,192 tokens|base|adapters, AdamW|gathered or unpacked|activations, head|sum", rows)


def lora_flops_table() -> str:
    full = training_flops(a_weight=8)
    lora = training_flops(a_weight=6, head=4) + 4 * M.layers * M.hidden * PAIR.attended
    rows = [("full, checkpointed", "8", "6NDV", f"{full / 1e12:.0f}", "1.00"),
            ("LoRA, checkpointed", "6", "4NDV", f"{lora / 1e12:.0f}", f"{lora / full:.2f}")]  # fmt: skip
    return table("of a pair|a weight and token|head|TFLOP a pair|of full", rows)


TABLES = {
    name.removesuffix("_table"): made for name, made in list(globals().items()) if name.endswith("_table")
}  # fmt: skip


def with_tables(text: str) -> str:
    def filled(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", filled, text, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    text = PAGE.read_text()
    if "--check" in arguments:
        if with_tables(text) == text:
            return 0
        print("docs/scaling.md does not show what its formulas give; run: python docs/scaling.py")
        return 1
    PAGE.write_text(with_tables(text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
