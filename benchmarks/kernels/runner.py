"""Measures the variants of a problem: first whether the numbers agree, and only then the time and the memory."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from problems import Mode, Problem
from timing import Mark, interleaved_intervals, peak_extra_bytes
from torch import Tensor
from variants import Function, Unavailable, Variant

# Of a row: given only where the numbers agree. Times are medians; `spread` is that of `ms`, as a share of it.
FIGURES = ("ms", "forward_ms", "backward_ms", "spread", "rate", "share_of_ceiling", "extra_bytes")


def unmarked() -> None:
    pass


class Run:
    """One variant in one mode of a problem, to be run any number of times."""

    def __init__(self, problem: Problem, variant: Variant, mode: Mode, function: Function) -> None:
        self.problem, self.variant, self.mode, self.function = problem, variant, mode, function

    def __call__(self, mark: Mark = unmarked) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """Output and gradients (None for inputs that need none); marks before, between and after the two."""
        leaves = self.leaves()
        mark()
        output = self.forward(leaves)
        mark()
        if not self.mode.has_gradient:
            return output, ()
        grads = self.backward(output, leaves)
        mark()
        return output.detach(), grads

    def leaves(self) -> tuple[Tensor, ...]:
        return self.problem.leaves(self.variant, self.mode)

    def forward(self, leaves: tuple[Tensor, ...]) -> Tensor:
        with torch.set_grad_enabled(self.mode.has_gradient):
            return self.function(*leaves)

    def backward(self, output: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        needed = [leaf for leaf in leaves if leaf.requires_grad]
        grads = iter(torch.autograd.grad(output, needed, self.problem.upstream(self.variant.returns, output)))
        return tuple(next(grads) if leaf.requires_grad else None for leaf in leaves)

    def errors(self) -> dict[str, float]:
        """Of one run, as multiples of what is allowed."""
        return self.problem.errors(self.variant, *self())


def agrees(errors: dict[str, float]) -> bool:
    return bool(errors) and all(error <= 1 for error in errors.values())  # NaN is not


def message(error: Exception) -> str:
    """The first line, with the name of the exception; messages of compilers are pages long."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}".rstrip(": ")


def empty_row(variant: Variant) -> dict[str, Any]:
    keys = ("package", "reason", "numbers_agree", "errors", "first_run_seconds", *FIGURES)
    return {"returns": variant.returns, "status": "not measured", **dict.fromkeys(keys)}


def failed(row: dict[str, Any], error: Exception) -> None:
    row.update(status="failed", reason=message(error), **dict.fromkeys(FIGURES))


def measure(
    problem: Problem, variants: Iterable[Variant], ceiling: float, repeats: int = 10, warmup: int = 3
) -> dict[str, Any]:
    """Rows of all variants in all modes of the problem. `ceiling`: units of work that the device does in a second."""
    part: dict[str, Any] = {
        "family": problem.family,
        **problem.shape,
        "dtype": str(problem.dtype).removeprefix("torch."),
        "unit": problem.unit,
        "ceiling_per_second": ceiling,
        "modes": {},
    }
    functions: dict[str, Function | Exception] = {}
    variants = tuple(variants)
    for variant in variants:
        try:
            functions[variant.name] = variant.function(problem)
        except Exception as error:  # a peer's own fault, and the others are to be measured
            functions[variant.name] = error
    for mode in problem.modes:
        rows = {variant.name: empty_row(variant) for variant in variants}
        runs = {}
        for variant in variants:
            run = check(problem, variant, mode, functions[variant.name], rows[variant.name])
            if run is not None:
                runs[variant.name] = run
        time_and_memory(runs, rows, mode, ceiling, repeats, warmup)
        part["modes"][mode.name] = {"work": mode.work, "floor_ms": mode.work / ceiling * 1e3, "variants": rows}
    return part


def check(
    problem: Problem, variant: Variant, mode: Mode, function: Function | Exception, row: dict[str, Any]
) -> Run | None:
    """Fills in what the numbers say; returns what may be timed, which is nothing unless they agree."""
    if isinstance(function, Unavailable):
        row.update(status="unavailable", reason=str(function))
        return None
    row["package"] = variant.version()
    if isinstance(function, Exception):
        failed(row, function)
        return None
    run = Run(problem, variant, mode, function)
    problem.expected(variant.returns)  # made once, and no part of anybody's first run
    began = time.perf_counter()
    try:
        errors = run.errors()
    except Exception as error:  # as above
        failed(row, error)
        return None
    row["first_run_seconds"] = time.perf_counter() - began
    row["errors"] = {name: error if math.isfinite(error) else None for name, error in errors.items()}  # JSON has no NaN
    row["numbers_agree"] = agrees(errors)
    if not row["numbers_agree"]:
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        row.update(status="numbers disagree", reason=f"{worst}: {errors[worst]:.3g} times the error allowed")
        return None
    return run


def time_and_memory(
    runs: dict[str, Run], rows: dict[str, dict[str, Any]], mode: Mode, ceiling: float, repeats: int, warmup: int
) -> None:
    for name, timing in interleaved_intervals(runs, repeats, warmup).items():
        row = rows[name]
        if isinstance(timing, Exception):
            failed(row, timing)
            continue
        seconds = timing.seconds
        try:
            row["extra_bytes"] = peak_extra_bytes(runs[name])
        except Exception as error:  # as above
            failed(row, error)
            continue
        row.update(
            status="measured",
            ms=seconds[0] * 1e3,
            forward_ms=seconds[1] * 1e3,
            backward_ms=seconds[2] * 1e3 if mode.has_gradient else None,
            spread=timing.spread,
            rate=mode.work / seconds[0],
            share_of_ceiling=mode.work / seconds[0] / ceiling,
        )
