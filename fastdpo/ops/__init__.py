"""Differentiable operations over the kernels: checks of the arguments, choice of implementation, autograd."""

from fastdpo.ops.gather_kv import gather_kv
from fastdpo.ops.linear_logps import linear_token_logps, linear_token_logps_with_stats
from fastdpo.ops.linear_loss import fused_group_loss, is_fused
from fastdpo.ops.sum_by_id import sum_by_id
from fastdpo.ops.token_logps import token_logps, token_logps_with_stats

__all__ = [
    "fused_group_loss",
    "gather_kv",
    "is_fused",
    "linear_token_logps",
    "linear_token_logps_with_stats",
    "sum_by_id",
    "token_logps",
    "token_logps_with_stats",
]
