"""report.png: the curves of a run and its costs, from the trainer's log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# One colour a quantity, the same in all panels.
_CHOSEN, _REJECTED, _NEUTRAL = "#1b7837", "#b2182b", "#2166ac"


def speed_summary(log_history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the logs of a run (peak memory: the maximum) of what the trainer logs under perf/."""
    logged = [entry for entry in log_history if "perf/tokens_per_second" in entry]
    if not logged:
        return {}
    names = ["tokens_per_second", "pairs_per_second", "saved_tokens_fraction"]
    if all("perf/mfu" in entry for entry in logged):  # there was memory to measure what it is a share of
        names.append("mfu")
    summary = {name: sum(entry[f"perf/{name}"] for entry in logged) / len(logged) for name in names}
    summary["peak_memory_gb"] = max(entry["perf/peak_memory_gb"] for entry in logged)
    return summary


def write_report(
    path: Path,
    log_history: Sequence[Mapping[str, float]],
    *,
    title: str,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> None:
    """Draws loss, rewards, margins and accuracy over the steps, and a panel of text, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    logged = [entry for entry in log_history if "rewards/margins" in entry]
    steps = [entry["step"] for entry in logged]
    panels: dict[str, list[tuple[str, str, str]]] = {
        "loss": [("loss", "loss", _NEUTRAL)],
        "rewards  β·log(π/π_ref)": [
            ("chosen", "rewards/chosen", _CHOSEN),
            ("rejected", "rewards/rejected", _REJECTED),
        ],
        "reward margin": [("chosen − rejected", "rewards/margins", _NEUTRAL)],
        "reward accuracy": [("chosen above rejected", "rewards/accuracies", _NEUTRAL)],
    }
    figure, axes = plt.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    flat = list(axes.flat)
    for axis, (heading, lines) in zip(flat, panels.items(), strict=False):
        for label, key, colour in lines:
            axis.plot(steps, [entry[key] for entry in logged], color=colour, label=label, marker=".", linewidth=1.5)
        axis.set_title(heading)
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(frameon=False)
    flat[3].set_ylim(-0.05, 1.05)
    _held_out_panel(flat[4], before, after)
    flat[5].axis("off")
    flat[5].set_title("speed and memory")
    flat[5].text(0.02, 0.92, "\n".join(_speed_lines(speed_summary(log_history))), va="top", family="monospace")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _held_out_panel(axis: Any, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> None:
    axis.set_title("held-out preference accuracy")
    if before is None or after is None:
        axis.axis("off")
        axis.text(0.5, 0.5, "no held-out pairs", ha="center", va="center")
        return
    values = [before["accuracy"], after["accuracy"]]
    axis.bar(["before", "after"], values, color=[_REJECTED, _CHOSEN], width=0.5)
    for x, value in enumerate(values):
        axis.text(x, value + 0.02, f"{value:.0%}", ha="center")
    axis.set_ylim(0, 1.15)
    axis.set_ylabel(f"share of {after['pairs']} pairs")


def _speed_lines(summary: Mapping[str, float]) -> list[str]:
    if not summary:
        return ["nothing was logged"]
    return [
        f"{summary['tokens_per_second']:10,.0f}  tokens a second",
        f"{summary['pairs_per_second']:10.2f}  pairs a second",
        f"{summary['saved_tokens_fraction']:10.1%}  of tokens saved by sharing prompts",
        *([f"{summary['mfu']:10.1%}  of the measured matmul speed"] if "mfu" in summary else []),
        f"{summary['peak_memory_gb']:10.2f}  GB peak memory",
    ]
