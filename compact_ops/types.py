"""Named tuples of tensors that the head operators take and return."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class GoldAnswers(NamedTuple):
    """The gold answers of P problems as one ragged table, and the problem of each token.

    Attributes:
        ids: [G] int32 or int64, the token ids of all answers, one after the other.
        offsets: [P + 1] int32 or int64; the answer of problem p is
            ids[offsets[p] : offsets[p + 1]].
        problem: [M] int32 or int64, the problem of each token (each row of the statistics).
    """

    ids: Tensor
    offsets: Tensor
    problem: Tensor


class TokenStats(NamedTuple):
    """Per-token statistics of the LM head, in float32 (float64 for float64 input) and in nats.

    Attributes:
        nll: [M] negative log-likelihood of the target; 0 where ignored. Differentiable.
        lse: [M] log-sum-exp of the logits.
        entropy: [M] entropy of the softmax.
        correct: [M] bool, whether no logit is larger than the target's; False where ignored.
        gold_logit: [M] mean logit of the gold answer's tokens, or None without `gold`.
        gold_logp: [M] mean log-likelihood of the gold answer's tokens, or None without `gold`.
        weight: [M] the token weights that the call got or computed, or None. No gradient flows into
            them.
    """

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    correct: Tensor
    gold_logit: Tensor | None
    gold_logp: Tensor | None
    weight: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenStats:
        """Applies `change` to every tensor; fields that are None stay None."""
        nll, lse, entropy, correct, *rest = self
        golds_and_weight = (None if x is None else change(x) for x in rest)
        return TokenStats(
            change(nll), change(lse), change(entropy), change(correct), *golds_and_weight
        )
