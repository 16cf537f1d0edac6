"""Writes the README's tables from the result files; with --check, only says whether they are up to date.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, one for each device that has been measured. Rows that
nobody has measured yet leave it, all of them for one collapsed block, the table `not_measured`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MISSING = "not measured"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "step")]

from turns import Spread  # noqa: E402
from workloads import PLANS, REFERENCE_PAIRS, REFERENCE_PLANS, TRAINER_PLANS, Part  # noqa: E402


def results(name: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{name}.json"))]


def source(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    return f"{record['device']}; {versions}; commit {record['commit']}; {record['date']}"


def step_hh_cpu() -> str:
    lines = []
    for record in results("step_hh_cpu"):
        ours, theirs = record["fastdpo"], record["trl"]
        lines += [
            f"| {record['pairs']} pairs of HH-RLHF lengths, SmolLM2-135M, float32, batches of 8 | fastdpo | "
            f"TRL {record['versions']['trl']} | fastdpo / TRL |",
            "|---|---:|---:|---:|",
        ]
        ratios, memory = record["ratios"], record["ratio_peak_memory_gb"]
        for label, key, shown in (
            ("training step with cached reference, s a pair", "seconds_a_pair", ratios and Spread.of(ratios).told(2)),
            ("start: tokenizing and reference log-probs, s", "start_seconds", "see below"),
            ("peak memory, GB", "peak_memory_gb", memory and f"{memory:.2f}"),
        ):
            lines.append(f"| {label} | {ours[key]:.2f} | {theirs[key]:.2f} | {shown or MISSING} |")
        lines += [
            "",
            f"Step by step in turn; the ratio is the median of {len(ratios or [])} steps, with the least and the "
            f"greatest. Losses and gradient norms of all steps agreed to 1e-3. {source(record)}.",
            "",
        ]
    return "\n".join(lines).strip() or f"{MISSING}: run `make bench`"


STEP_COMMANDS = {"cpu": "make bench", "cuda": "make bench-gpu"}
STEP_DEVICES = {"cpu": "on a CPU", "cuda": "on a GPU"}
BASELINES = {"trl": "TRL", "plain": "a plain padded step", "naive": "padded passes"}


def train_step() -> str:
    """Prefix packing in every planned part, a table a device; a device of a kind that nobody has measured says so."""
    records = results("train_step")
    tables = []
    for kind in STEP_COMMANDS:
        tables += [_steps(kind, record) for record in records if record["device_type"] == kind] or [_steps(kind, None)]
    return "\n\n".join(tables)


def _steps(kind: str, record: dict[str, Any] | None) -> str:
    device = STEP_DEVICES[kind] if record is None else record["device"]
    lines = [f"| {device} | pairs/s | speed-up | FLOP ratio | memory ratio |", "|---|---:|---:|---:|---:|"]
    for planned in PLANS[kind]:
        part = None if record is None else _measured(record, planned)
        row = {} if part is None else part["contestants"]["prefix"]
        if part is None or row["pairs_per_second"] is None:
            cells = [f"{MISSING} (`{STEP_COMMANDS[kind]}`)", "", "", ""]
        else:
            memory = row["memory_ratio"]
            cells = [f"{row['pairs_per_second']:.3g}", _against(part, "speedup"), _against(part, "flop_ratio"),
                     MISSING if memory is None else f"{memory:.2f}"]  # fmt: skip
        lines.append(f"| {planned} | " + " | ".join(cells) + " |")
    if record is not None:
        lines += ["", f"{source(record)}.{_step_goals(record['goals'])}"]
    return "\n".join(lines)


def _step_goals(goals: list[dict[str, Any]]) -> str:
    """How many were met, and which were not."""
    if not goals:
        return ""
    rest = [f"{goal['goal']}, {goal['model']} {goal['shape']}: {goal['verdict']}" for goal in goals]
    rest = [text for text, goal in zip(rest, goals, strict=True) if goal["verdict"] != "met"]
    return f" Goals met: {len(goals) - len(rest)} of {len(goals)}" + (f" ({'; '.join(rest)})." if rest else ".")


def _measured(record: dict[str, Any], planned: Part) -> dict[str, Any] | None:
    wanted = (planned.model, planned.shape, planned.pairs)
    return next((part for part in record["parts"] if (part["model"], part["shape"], part["pairs"]) == wanted), None)


def _against(part: dict[str, Any], key: str) -> str:
    """A ratio of prefix packing, and what to; without a baseline (out of memory, say) there is none."""
    ratio = part["contestants"]["prefix"][key]
    return MISSING if ratio is None else f"{_times(ratio)} {BASELINES[part['baseline']]}"


KERNEL_CASES = {
    ("logits", "no grad"): "log-probs from logits, no gradient",
    ("logits", "gradient"): "log-probs from logits, with gradient",
    ("dpo", "no grad"): "DPO loss from hidden states, no gradient",
    ("dpo", "frozen head"): "DPO loss from hidden states, frozen head",
    ("dpo", "trainable"): "DPO loss from hidden states, trainable head",
    ("head", "no grad"): "log-probs from hidden states, no gradient",
    ("head", "frozen head"): "log-probs from hidden states, frozen head",
    ("head", "trainable"): "log-probs from hidden states, trainable head",
}


def gpu() -> str:
    kernels = [record for name in ("logprobs", "logprobs_fastdpo_quack") for record in results(name)]
    tables = [_kernels(record) for record in kernels if record["device_type"] == "cuda"]
    rows = [_rows(record) for record in results("rows") if record["device_type"] == "cuda"]
    gathers = [_gather(record) for record in results("gather") if record["device_type"] == "cuda"]
    lines = ["| on a GPU | |", "|---|---|"]
    if not tables:
        lines.append(f"| log-probs from logits, share of copy bandwidth | {MISSING} (`make bench-gpu`) |")
    if not rows:
        lines.append(f"| row kernels and their predecessors, share of copy bandwidth | {MISSING} (`make bench-gpu`) |")
    if not gathers:
        lines.append(f"| gather of keys and values, share of copy bandwidth | {MISSING} (`make bench-gpu`) |")
    lines.append(f"| training step, speed-up of prefix packing | {_speedups(results('train_step'))} |")
    return "\n\n".join([*tables, *rows, *gathers, "\n".join(lines)])


def _rows(record: dict[str, Any]) -> str:
    """One row a kernel and size; the kernels of today, and those before them."""
    lines = [f"| {record['device']}: row kernels, ms | sums per thread | sums per row, as before |", "|---|---:|---:|"]
    for part in record["parts"]:
        softcap = "" if part["softcap"] is None else f", softcap {part['softcap']:g}"
        for kernel, variants in part["kernels"].items():
            cells = [
                MISSING if row["ms"] is None else f"{row['ms']:.3f} ({row['share_of_ceiling']:.0%})"
                for row in variants.values()
            ]
            lines.append(f"| {kernel}, N={part['n']} V={part['v']}{softcap} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"In brackets the share of a copy. {source(record)}.{_notes(record)}"])


def _gather(record: dict[str, Any]) -> str:
    lines = [f"| {record['device']}: gather of keys and values, there and back, ms | fastdpo | index_select |",
             "|---|---:|---:|"]  # fmt: skip
    for part in record["parts"]:
        rows = part["variants"].values()
        cells = [MISSING if row["ms"] is None else f"{row['ms']:.3f} ({row['share_of_ceiling']:.0%})" for row in rows]
        lines.append(f"| {part['group']}, {part['layout']}, T={part['t']} K={part['k']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"In brackets the share of a copy. {source(record)}.{_notes(record)}"])


def _notes(record: dict[str, Any]) -> str:
    """The goals, and what went wrong."""
    notes = ""
    if goals := record.get("goals"):
        met = [goal for goal in goals if goal["verdict"] == "met"]
        rest = [f"{goal['goal']}, {goal['case']}: {goal['verdict']}" for goal in goals if goal["verdict"] != "met"]
        notes = f" Goals met: {len(met)} of {len(goals)}" + (f" ({'; '.join(rest)})." if rest else ".")
    problems = record.get("problems")
    return notes + (f" Problems: {'; '.join(problems)}." if problems else "")


def _kernels(record: dict[str, Any]) -> str:
    """One row a task and size; one column for fastdpo, and one for each package with its fastest right variant."""
    tasks = [
        (f"{label}, {_shape(part)}", part["modes"][mode]["variants"])
        for (family, mode), label in KERNEL_CASES.items()
        for part in record["parts"]
        if part["family"] == family
    ]
    columns = dict.fromkeys(
        _contestant(name) for _, rows in tasks for name, row in rows.items() if row["status"] != "unavailable"
    )
    lines = [f"| {record['device']}: ms, extra GB | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for label, rows in tasks:
        lines.append(f"| {label} | " + " | ".join(_cell(rows, column) for column in columns) + " |")
    lines += [
        "",
        "In brackets the share of what this device reached in the same run: a copy, or a large matrix product. A time "
        "stands only where outputs and gradients err at most twice as much as those of plain code in the same dtype.",
        f"{source(record)}.{_notes(record)}",
    ]
    return "\n".join(lines)


def _shape(part: dict[str, Any]) -> str:
    return " ".join(f"{key.upper()}={part[key]}" for key in ("n", "d", "v") if key in part)


def _contestant(variant: str) -> str:
    return variant.split(",")[0]


def _cell(rows: dict[str, dict[str, Any]], column: str) -> str:
    # Ours is what a call without options does; of the others, the best that there is.
    mine = [row for name, row in rows.items() if (name if column == "fastdpo" else _contestant(name)) == column]
    times = [row for row in mine if row["ms"] is not None]
    if not times:
        states = {row["status"] for row in mine} - {"unavailable"}
        return "numbers differ" if "numbers disagree" in states else ", ".join(sorted(states)) or "–"
    best = min(times, key=lambda row: row["ms"])
    share = f" ({best['share_of_ceiling']:.0%})" if column == "fastdpo" else ""
    return f"{best['ms']:.2f}{share}, {best['extra_bytes'] / 1e9:.2f}"


def kernels_cpu() -> str:
    lines = []
    for record in results("kernels_cpu"):
        dtype = record["parts"][0]["dtype"]
        lines += [f"| fastdpo / plain PyTorch on a CPU, {dtype} | time | extra memory | the same without gradients |",
                  "|---|---:|---:|---:|"]  # fmt: skip
        for part in record["parts"]:
            for mode, rows in part["modes"].items():
                for name, row in rows.items():
                    if _contestant(name) != "fastdpo":
                        continue
                    label = KERNEL_CASES[part["family"], mode] + name.removeprefix("fastdpo")
                    ratios = (row["time_ratio"], row["memory_ratio"], row["work_memory_ratio"])
                    cells = " | ".join(MISSING if ratio is None else f"{ratio:.2f}" for ratio in ratios)
                    lines.append(f"| {label}, {_shape(part)} | {cells} |")
        lines += ["", f"{source(record)}; {record['threads']} threads.", ""]
    command = "python benchmarks/kernels/cpu_claims.py --results benchmarks/results"
    return "\n".join(lines).strip() or f"{MISSING}: run `{command}`"


def _speedups(records: list[dict[str, Any]]) -> str:
    cells = []
    for record in records:
        for part in record["parts"] if record["device_type"] == "cuda" else ():
            cells.append(f"{record['device']}, {part['model']}, {part['shape']}: {_against(part, 'speedup')}")
    return "; ".join(cells) or f"{MISSING} (`make bench-gpu`)"


def reference() -> str:
    """The reference pass: a table a CPU, then one a GPU; one that nobody has measured says so."""
    cpu = [_reference_cpu(record) for record in results("reference_cpu")] or [_reference_cpu(None)]
    gpu = [_reference_gpu(record) for record in results("reference_gpu")] or [_reference_gpu(None)]
    return "\n\n".join([*cpu, *gpu])


REFERENCE_ROWS = {"s": "seconds", "peak memory, GB": "peak_memory_gb", "tokens through the backbone": "backbone_tokens"}


def _reference_cpu(record: dict[str, Any] | None) -> str:
    title = f"{REFERENCE_PAIRS} pairs of HH-RLHF lengths, SmolLM2-135M, float32"
    if record is None:
        return f"| {STEP_DEVICES['cpu']} | |\n|---|---|\n| {title} | {MISSING} (`{STEP_COMMANDS['cpu']}`) |"
    (part,) = record["parts"]
    rows = part["contestants"]
    others = {"trl": ("default, ", "speedup"), "trl_best": ("its fastest, ", "speedup_best")}
    others = {name: column for name, column in others.items() if name in rows}
    trl = f"TRL {record['versions']['trl']}"
    heads = [f"{trl}, {which}batches of {rows[name]['batch_size']}" for name, (which, _) in others.items()]
    lines = [f"| {title} | fastdpo | " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * len(others)]
    for label, key in REFERENCE_ROWS.items():
        lines.append(f"| {label} | " + " | ".join(_reference_cell(row, key) for row in rows.values()) + " |")
    speedups = (_times(rows["prefix"][figure]) for _, figure in others.values())
    lines += [
        f"| speed-up of fastdpo | | {' | '.join(speedups)} |",
        "",
        f"Medians of {record['rounds']} runs in turn. {source(record)}.{_step_goals(record['goals'])}",
    ]
    return "\n".join(lines)


def _reference_cell(row: dict[str, Any], key: str) -> str:
    if not row["numbers_agree"]:
        return "numbers differ"
    return str(row[key]) if key == "backbone_tokens" else f"{row[key]:.2f}"


def _reference_gpu(record: dict[str, Any] | None) -> str:
    device = STEP_DEVICES["cuda"] if record is None else record["device"]
    lines = [f"| {device} | tokens/s | of the matrix-product ceiling | device busy | speed-up |",
             "|---|---:|---:|---:|---:|"]  # fmt: skip
    for planned in REFERENCE_PLANS["cuda"]:
        part = None if record is None else _measured(record, planned)
        row = {} if part is None else part["contestants"]["prefix"]
        if row.get("seconds") is None:
            cells = [f"{MISSING} (`{STEP_COMMANDS['cuda']}`)", "", "", ""]
        else:
            busy = row["device_seconds"]
            cells = [f"{row['tokens_per_second']:,.0f}", f"{row['share_of_ceiling']:.0%}",
                     MISSING if busy is None else f"{busy / row['seconds']:.0%}",
                     _against(part, "speedup")]  # fmt: skip
        lines.append(f"| {planned} | " + " | ".join(cells) + " |")
    if record is not None:
        lines += ["", f"{source(record)}.{_step_goals(record['goals'])}"]
    return "\n".join(lines)


PADDED_PEERS = {"trl": "TRL", "trl liger": "TRL with Liger's layers", "padded": "fastdpo, padded"}


def trainer_gpu() -> str:
    """Whole trainers: prefix packing beside the fastest padded peer, and beside a packed row without sharing."""
    records = [record for record in results("trainer_gpu") if record["device_type"] == "cuda"]
    return "\n\n".join(_trainers(record) for record in records or [None])


def _trainers(record: dict[str, Any] | None) -> str:
    device = STEP_DEVICES["cuda"] if record is None else record["device"]
    lines = [f"| whole trainer, HH-RLHF lengths, {device} | pairs/s | MFU | over padded | over packed, not shared | "
             "memory / padded |", "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    measured = {} if record is None else {part["title"]: part["contestants"] for part in record["parts"]}
    for planned in map(str, sorted(TRAINER_PLANS["cuda"], key=lambda part: (part.settings, part.pairs))):
        rows = measured.get(planned, {})
        ours = rows.get("prefix", {})
        if ours.get("seconds") is None:
            cells = [MISSING, "", "", "", ""]
        else:
            peer = _fastest(rows, "trl", "trl liger") or _fastest(rows, "padded")
            memory = None if peer is None else rows[peer]["memory_ratio"]
            cells = [f"{ours['pairs_per_second']:.3g}", f"{ours['mfu']:.0%}", _over(rows, peer),
                     _over(rows, _fastest(rows, "varlen")), MISSING if memory is None else f"{memory:.2f}"]  # fmt: skip
        lines.append(f"| {planned} | " + " | ".join(cells) + " |")
    if record is not None:
        lines += ["", f"Speed-up, and in brackets the ratio of the counted FLOPs. {source(record)}."]
    return "\n".join(lines)


def _fastest(rows: dict[str, Any], *names: str) -> str | None:
    times = {name: rows[name]["seconds"] for name in names if rows.get(name, {}).get("seconds") is not None}
    return min(times, key=times.__getitem__) if times else None


def _over(rows: dict[str, Any], name: str | None) -> str:
    if name is None:
        return MISSING
    row = rows[name]
    return f"{row['speedup']:.2f}× ({row['flop_ratio']:.2f}×)" + (f" {PADDED_PEERS[name]}" if name != "varlen" else "")


def _times(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}×"


TABLES = {
    "step_hh_cpu": step_hh_cpu,
    "train_step": train_step,
    "reference": reference,
    "gpu": gpu,
    "kernels_cpu": kernels_cpu,
    "trainer_gpu": trainer_gpu,
}


# What a row that leaves its table is about, before the first cell of the table's head.
TOPICS = {"train_step": "training step", "reference": "reference pass", "kernels_cpu": "kernels on a CPU",
          "step_hh_cpu": "training beside TRL on a CPU"}  # fmt: skip
UNMEASURED = re.compile(rf"\| (?P<row>[^|]+?) \| {MISSING}(?: \((?P<command>`[^`]+`)\))?(?:[ |]|{MISSING})*")


def measured(name: str, text: str) -> tuple[str, list[str]]:
    """A table's text without the rows of which nothing is measured, and what those rows were."""
    kept, left_out = [], []
    for block in text.split("\n\n"):
        if block.startswith(f"{MISSING}: run "):
            left_out.append(f"{TOPICS.get(name, name)}: {block.removeprefix(f'{MISSING}: run ')}")
            continue
        lines = block.split("\n")
        if not lines[0].startswith("|"):
            kept.append(block)
            continue
        head, rows = lines[:2], []
        about = ", ".join(filter(None, (TOPICS.get(name), head[0].strip("| ").split(" | ")[0])))
        for line in lines[2:]:
            if found := UNMEASURED.fullmatch(line):
                command = f" ({found['command']})" if found["command"] else ""
                left_out.append(f"{about}: {found['row']}{command}")
            else:
                rows.append(line)
        if rows:
            kept.append("\n".join([*head, *rows]))
    return "\n\n".join(kept), left_out


def collapsed(rows: list[str]) -> str:
    """One closed block of what is not measured; nothing where everything is."""
    if not rows:
        return ""
    listed = "\n".join(f"- {row}" for row in rows)
    return f"<details><summary>{len(rows)} rows are {MISSING} yet</summary>\n\n{listed}\n\n</details>"


def filled(text: str) -> str:
    made = {name: measured(name, make()) for name, make in TABLES.items()}
    texts = {name: table for name, (table, _) in made.items()}
    texts["not_measured"] = collapsed([row for _, rows in made.values() for row in rows])

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n{texts[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text()
    new = filled(text)
    if "--check" in sys.argv:
        if new != text:
            print("README.md is not what the result files say; run `make tables`.")
        return int(new != text)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
