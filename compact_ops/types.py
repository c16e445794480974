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
            ids[offsets[p] : offsets[p + 1]]. It has at least one token if a token belongs to p.
        problem: [M] int32 or int64, the problem of each token (each row of the statistics).
    """

    ids: Tensor
    offsets: Tensor
    problem: Tensor


class ProblemWeights(NamedTuple):
    """The weights of R rationales, and the z-scores from which they were computed.

    Attributes:
        weight: [R] float32 (float64 for float64 scores), sums to 1 over each problem.
        zscores: [S, R] in the same dtype: S scores, standardised within each problem; 0 in a
            problem with one rationale.
    """

    weight: Tensor
    zscores: Tensor


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
        rank: [M] int32, 1 + the number of other logits that are larger than the target's; 0 where
            ignored or where a logit is NaN. It is 1 exactly where `correct` is True. None unless
            asked for, like the fields below.
        sum_p2: [M] sum over v of p_v^2, in (0, 1], whatever the target is. The squared norm of
            d nll / d z is sum_p2 - 2 p_t + 1, with p_t = exp(-nll).
        margin: [M] the target's logit minus the largest other logit, >= 0 exactly where `correct`
            is True; 0 where ignored, inf if the vocabulary has one token.
        score_logp: [M, C] log p of the ids that the call gave in `score_ids`, also where the target
            is ignored; -inf where an id is absent (-1), so that a log-sum-exp leaves it out.
    """

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    correct: Tensor
    gold_logit: Tensor | None
    gold_logp: Tensor | None
    weight: Tensor | None = None
    rank: Tensor | None = None
    sum_p2: Tensor | None = None
    margin: Tensor | None = None
    score_logp: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> TokenStats:
        """Applies `change` to every tensor; fields that are None stay None."""
        nll, lse, entropy, correct, *rest = self
        optional = (None if x is None else change(x) for x in rest)
        return TokenStats(change(nll), change(lse), change(entropy), change(correct), *optional)
