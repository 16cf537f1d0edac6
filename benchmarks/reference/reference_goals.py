"""What the reference pass means to reach; `step_goals.evaluate` says whether it did."""

from __future__ import annotations

from step_goals import Goal

CPU_MODEL = "SmolLM2-135M"

GOALS = (
    Goal("speed against TRL's default", "speedup", 4.0, model=CPU_MODEL, against_trl=True, device=""),
    Goal("share of the GEMM ceiling", "share_of_ceiling", 0.6, model="8B"),
)
