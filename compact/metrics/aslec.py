"""Adaptability as mean log-likelihood without the advantage of long steps.

The first token of a step is unlikely, because a step may begin in many ways. Long steps have fewer
first tokens, so plain `grape` prefers them. Source: "On the Step Length Confounding in LLM
Reasoning Data Selection" (arXiv 2604.06834). Higher is better.

`aslec-drop`: the mean of log p(y_t) over the tokens that are not the first of a step.

`aslec-casl`, two stages. First a least-squares fit over the pool, with an intercept:
M_k = b0 + b1 N_k + b2 F_k + c S_k, where M is the mean over all tokens, N over those that are not
the first of a step, F over the first ones, and S the share of first tokens. Then the score is
M_k - c S_k.

Here a step is one of COMPACT's steps, and the answer part counts as a step; the public code cuts
sentences at ". " and "? ", and takes the first two tokens of each by default, the paper takes one,
as we do. If all tokens are first tokens, N is M.

The pool of `aslec-casl` is the pass, so it cannot be part of a preset: the weights would depend on
the micro-batches. With few rationales the fit means little: use passes of 20 rationales or more, or
`remove_step_share` on the means of a whole data set. A fit that is not unique takes the solution of
least norm on standardised columns, and directions with a spread below a thousandth of the largest
are left out: their slope would be rounding noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact.metrics import TOKEN_MEAN, register
from compact.passes import Batch, Pass
from compact.passes.segments import segment_mean, segment_sum

_LEAST_SPREAD = 1e-3


def first_tokens(batch: Batch) -> Tensor:
    """Returns [M] bool: whether a token is the first of a step or of the answer part."""
    first = torch.zeros(batch.target.shape, dtype=torch.bool)
    rationales = [r for problem in batch.problems for r in problem.rationales]
    for offset, rationale in zip(batch.token_offsets[:-1].tolist(), rationales, strict=True):
        starts = {start for start, _ in rationale.steps} | {rationale.steps[-1][1]}
        first[[offset + start for start in starts if start < len(rationale.ids)]] = True
    return first.to(batch.target.device)


def step_means(pass_: Pass) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns M, N, F (nats per token) and the share S of first tokens, each [R] float64."""
    offsets = pass_.batch.token_offsets
    logp = -pass_.stats.nll.detach().double()
    first = first_tokens(pass_.batch).double()
    count = segment_sum(first, offsets)
    rest = offsets.diff() - count
    mean = segment_mean(logp, offsets)
    others = segment_sum(logp * (1.0 - first), offsets) / rest.clamp(min=1.0)
    return (
        mean,
        torch.where(rest > 0, others, mean),
        segment_sum(logp * first, offsets) / count,
        segment_mean(first, offsets),
    )


def remove_step_share(mean: Tensor, others: Tensor, first: Tensor, share: Tensor) -> Tensor:
    """Returns [n] M - c S, with the slope c fitted over all n rationales.

    Args:
        mean: [n] M, the mean log-likelihood over all tokens.
        others: [n] N, over tokens that are not the first of a step.
        first: [n] F, over first tokens.
        share: [n] S, share of first tokens, 0..1.
    """
    columns = torch.stack([others, first, share], dim=1).double().cpu()
    spread = columns.std(dim=0, correction=0)
    centred = (columns - columns.mean(dim=0)) / torch.where(spread > 0, spread, 1.0)
    target = (mean - mean.mean()).double().cpu()[:, None]
    fit = torch.linalg.lstsq(centred, target, rcond=_LEAST_SPREAD, driver="gelsd").solution[2, 0]
    slope = float(fit / spread[2]) if float(spread[2]) > 0 else 0.0
    return mean - slope * share


@register("aslec-drop", axis="adaptability", aggregation=TOKEN_MEAN)
def aslec_drop(pass_: Pass) -> Tensor:
    """Adaptability as the likelihood without each step's first token: [R] mean, in nats a token."""
    return step_means(pass_)[1].to(pass_.stats.nll.dtype)


@register(
    "aslec-casl",
    axis="adaptability",
    pooled=True,
    aggregation="mean over tokens, corrected by a fit over the pool; mean over rationales",
)
def aslec_casl(pass_: Pass) -> Tensor:
    """Adaptability as the likelihood less the fitted effect of the share of first tokens: [R]."""
    return remove_step_share(*step_means(pass_)).to(pass_.stats.nll.dtype)
