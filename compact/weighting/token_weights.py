"""Token weights: how much each token of a rationale counts, besides the weight of the rationale.

The loss of rationale k is alpha_k (1/T_k) sum_t w_t nll_t. w_t has no gradient. The mean is over
all T_k tokens, whatever their weights sum to, as in the papers: weights below 1 also make the loss
and its gradient smaller. w_t is computed from the statistics of the same forward.

To add one,

    @register_token_weights("my-weights")
    def my_weights(stats: TokenStats) -> Tensor: ...

in any module that is imported before training, and name it in the setting `token_weights`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from compact.registry import Registry
from compact_ops import TokenStats

TokenWeights = Callable[[TokenStats], Tensor]
"""From the statistics of M tokens to their weights [M], each finite and >= 0."""
TOKEN_WEIGHTS: Registry[TokenWeights] = Registry("token_weights")
register_token_weights = TOKEN_WEIGHTS.register

EAFT_CEILING = math.log(20)
"""Entropy in nats from which `eaft` weighs a token by 1: that of 20 equally likely tokens."""


@register_token_weights("none")
def none(stats: TokenStats) -> Tensor:
    """1: every token counts the same."""
    return torch.ones_like(stats.nll)


@register_token_weights("dft")
def dft(stats: TokenStats) -> Tensor:
    """p_t, the probability of the token.

    Source: dynamic fine-tuning (arXiv 2508.05629).
    """
    return torch.exp(-stats.nll)


@register_token_weights("eaft")
def eaft(stats: TokenStats) -> Tensor:
    """min(H_t / ln 20, 1), the entropy of the prediction over its ceiling.

    Source: entropy-adaptive fine-tuning (arXiv 2601.02151). The paper takes the entropy of the 20
    largest probabilities over its ceiling ln 20; this takes the entropy of all, which the head
    gives anyway, with the same ceiling.
    """
    return (stats.entropy / EAFT_CEILING).clamp(max=1.0)


@register_token_weights("cll")
def cll(stats: TokenStats) -> Tensor:
    """min(p_t e^H_t, 1): tokens that are less likely than is typical here count less.

    e^-H_t is the typical probability: the geometric mean under the student's own prediction.
    """
    return (stats.entropy - stats.nll).clamp(max=0.0).exp()


def weigh_tokens(name: str, stats: TokenStats) -> Tensor:
    """Returns the weights [M] of tokens, without gradient, in the dtype of their nll.

    Args:
        name: a registered name.
        stats: statistics of M tokens.

    Raises:
        ValueError: the name is unknown, or the weights do not have shape [M]. Their values are
            checked by `check_token_weights`.
    """
    weigh = TOKEN_WEIGHTS.get_or_raise(name)
    with torch.no_grad():
        weight = weigh(stats.map(Tensor.detach)).to(stats.nll)
    if weight.shape != stats.nll.shape:
        raise ValueError(
            f"token_weights {name} must have shape [M] = {list(stats.nll.shape)}, "
            f"got {list(weight.shape)}"
        )
    return weight


def check_token_weights(name: str, weight: Tensor, nll: Tensor) -> None:
    """Checks the values of token weights [M].

    Raises:
        ValueError: a weight is not finite or below 0, although the nll [M] of its token is finite:
            a nll that is not has its own error.
    """
    bad = (~(torch.isfinite(weight) & (weight >= 0)) & torch.isfinite(nll)).nonzero()
    if len(bad):
        raise ValueError(
            f"token_weights {name} must be finite and at least 0, got {float(weight[bad[0]])}"
        )
