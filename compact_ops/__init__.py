"""Fused operators for multi-teacher distillation: the LM head, its gradients, teacher weights.

On one machine, results are bit-identical from run to run and on CPUs for any number of threads.
Exceptions: the gradient of `accumulate_weighted` with respect to its weights, which torch sums, and
on CUDA the gradients of `tree_attention`. Machines with other caches or instruction sets split sums
differently, so the last bits may differ.
"""

from compact_ops._library import about_backend, backend
from compact_ops.accumulate_weighted import accumulate_weighted
from compact_ops.filtered_matmul import filtered_matmul
from compact_ops.flash_tree import TreeTables
from compact_ops.head_divergence import head_divergence
from compact_ops.linear_token_stats import STATISTICS as _STATISTICS
from compact_ops.linear_token_stats import linear_token_stats
from compact_ops.pairwise_symmetric_kl import pairwise_symmetric_kl
from compact_ops.problem_weights import problem_weights
from compact_ops.row_stats_ import row_stats_
from compact_ops.tree_attention import tree_attention
from compact_ops.types import GoldAnswers, ProblemWeights, TokenStats

__all__ = [
    "STATISTICS",
    "GoldAnswers",
    "ProblemWeights",
    "TokenStats",
    "TreeTables",
    "about_backend",
    "accumulate_weighted",
    "backend",
    "filtered_matmul",
    "head_divergence",
    "linear_token_stats",
    "pairwise_symmetric_kl",
    "problem_weights",
    "row_stats_",
    "tree_attention",
]

STATISTICS = _STATISTICS
"""The statistics that `linear_token_stats` computes on request; `TokenStats` says what they are."""
