"""What a run over a data set has found and done, and the bar that shows it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from fastdpo.reference.work import Pass, Prompt, Window


@dataclass
class Filled:
    """What a run found and did. rows: read, those of other slices too; the rest is of its own slice.

    sequences   different ones within a window of rows
    found       of them, those that the cache already held when their window was read
    computed    of them, those that were not there, but for what another process has computed in the meantime
    tokens      that the computed ones have, the prompt counted for each
    seconds     from the first row to the last shard
    """

    rows: int = 0
    sequences: int = 0
    found: int = 0
    computed: int = 0
    tokens: int = 0
    seconds: float = 0.0


class FillBar:
    """One progress bar: rows, tokens a second, time left, share found in the cache. Counts into `filled`."""

    def __init__(self, rows: int | None, filled: Filled, shown: bool) -> None:
        done = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}" if rows else "{n_fmt}"
        self._bar = tqdm(
            total=rows,
            desc="reference log-probs",
            unit="row",
            disable=not shown,
            mininterval=0.5,
            miniters=0,
            bar_format=f"{{desc}}: {done} rows [{{elapsed}}{{postfix}}]",
        )
        self._filled = filled
        self._began = time.perf_counter()
        self._planned = self._run = 0  # tokens that the backbone has to run for the rows read, and has run

    def __enter__(self) -> FillBar:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def open(self, window: Window, missing: list[Prompt]) -> None:
        sequences, lacking = len(window.keys), sum(len(prompt.completions) for prompt in missing)
        self._filled.rows += window.rows
        self._filled.sequences += sequences
        self._filled.found += sequences - lacking
        self._rows_a_token = window.rows * lacking / max(1, sequences) / max(1, _tokens(missing))
        self._planned = self._run + _tokens(missing)
        self._show()

    def advance(self, work: Pass) -> None:
        self._filled.computed += len(work.keys)
        self._filled.tokens += sum(len(prompt.ids) + len(completion) for prompt, completion in work.completions)
        self._run += work.tokens
        self._show()

    def close(self) -> None:
        """The window is done, by other processes too."""
        self._run = self._planned
        self._show()

    def _show(self) -> None:
        filled, seconds = self._filled, time.perf_counter() - self._began
        left = self._planned - self._run
        rows = filled.rows - round(left * self._rows_a_token)
        parts = [f"{filled.tokens / max(1e-9, seconds):,.0f} tokens/s"]
        if self._run and self._bar.total:
            left += (self._bar.total - filled.rows) * self._planned / filled.rows  # as many tokens a row as up to now
            parts.append(f"{tqdm.format_interval(left * seconds / self._run)} left")
        parts.append(f"{filled.found / max(1, filled.sequences):.0%} found in the cache")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update(rows - self._bar.n)


def _tokens(prompts: list[Prompt]) -> int:
    return sum(prompt.tokens for prompt in prompts)
