"""What the reference pass means to reach; `step_goals.evaluate` says whether it did."""

from __future__ import annotations

from step_goals import Goal, GoalAgainstTrl

CPU_MODEL = "SmolLM2-135M"

GOALS = (
    GoalAgainstTrl("speed against TRL's default", "speedup", 4.0, models=(CPU_MODEL,), device_type="cpu"),
    Goal("share of the GEMM ceiling", "share_of_ceiling", 0.6, models=("8B",)),
)
