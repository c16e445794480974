"""Adaptability as what a rationale does for the likelihood of the gold answer, in four reductions.

The student is asked for the gold answer a of m tokens after the bare question and after reasoning
steps (answer leaves). I_i is the mean log-likelihood of a's tokens after step i, I_0 after the bare
question. Higher is better in all four. Unlike `gain`, nothing is capped here.

- `answer-gain-net`: I_n - I_0, the information that the whole rationale adds.
- `answer-gain-least`: min_i (I_i - I_{i-1}), the worst step. Source: the informativeness of ReCEval
  (arXiv 2304.10703) and PACR (arXiv 2510.22255) ask that every step raises the likelihood.
- `answer-gain-mean-prob`: clip(mean_j p(a_j | x, y) - mean_j p(a_j | x), 0, 1). Source: RLPR
  (arXiv 2506.18254), which takes the mean of the probabilities, not of their logarithms.
- `answer-gain-rlt`: mean_j l_j + 0.01 min_j l_j - 3 (mean_t s_t + 0.01 max_t s_t), with l_j =
  log p(a_j | x, y) and s_t the nll of the rationale's token t. Source: the reward of
  Reinforcement-Learned Teachers (arXiv 2506.08388), with the factors of its published run.

What is approximated. (1) The answer is asked after a short cue and y ends with its last reasoning
step, so the answer part of the text does not count. (2) With a leaf budget not every step has a
leaf: `least` then sees the change over several steps as one, so a bad step may hide behind a good
one. The last step always has a leaf, so the other three do not change. (3) RLT penalises the KL
divergence from teacher to student along the rationale, at temperature 0.7. A text teacher has no
logits: s_t is the student's half of that divergence, at temperature 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact.metrics import register
from compact.metrics.gain import final_level, step_gains
from compact.passes import Pass
from compact.passes.forward import leaf_token_offsets
from compact.passes.segments import segment_mean

RLT_EXTREME = 0.01
"""Factor of the least likely answer token and of the most surprising rationale token."""
RLT_PENALTY = 3.0
"""Factor of the rationale's surprise."""
_LAST = "last answer leaf; mean over rationales"


def answer_tokens(pass_: Pass) -> tuple[Tensor, Tensor]:
    """Returns [Q] log-likelihood of each gold token of each leaf and [A + 1] offsets of the leaves.

    Raises:
        ValueError: if the batch was built without answer leaves.
    """
    batch, student = pass_.batch, pass_.student
    if pass_.leaf_hidden is None:
        raise ValueError("answer-gain: batch must be built with leaves=True, got no answer leaves")
    stats = student.token_stats(pass_.leaf_hidden, batch.leaf_target, rows=batch.leaf_rows)
    return -stats.nll, leaf_token_offsets(batch.leaf_index, batch.leaf_step.numel())


def _last_leaf(pass_: Pass) -> Tensor:
    """Returns [R] index of the leaf after each rationale's last step."""
    return pass_.batch.leaf_offsets[1:] - 1


@register(
    "answer-gain-net", axis="adaptability", needs_leaves=True, needs_gold=True, aggregation=_LAST
)
def net(pass_: Pass) -> Tensor:
    """Adaptability as the rise of the gold answer's likelihood over a text: [R] I_n - I_0, nats."""
    return final_level(pass_) - step_gains(pass_).start


@register(
    "answer-gain-least",
    axis="adaptability",
    needs_leaves=True,
    needs_gold=True,
    aggregation="least over steps with a leaf; mean over rationales",
)
def least(pass_: Pass) -> Tensor:
    """Adaptability as the smallest rise of the gold answer's likelihood in a step: [R], in nats."""
    gains = step_gains(pass_)
    parts = gains.gain.split(gains.offsets.diff().tolist())
    # A problem without a gold answer has no leaves.
    return torch.stack([part.min() if part.numel() else part.new_zeros(()) for part in parts])


@register(
    "answer-gain-mean-prob",
    axis="adaptability",
    needs_leaf_hidden=True,
    needs_gold=True,
    aggregation=_LAST,
)
def mean_prob(pass_: Pass) -> Tensor:
    """Adaptability as the rise of the mean probability of an answer token: [R], 0..1."""
    batch = pass_.batch
    known = batch.leaf_offsets.diff() > 0  # not in a problem without a gold answer
    gain = pass_.leaf_logp.new_zeros(batch.num_rationales)
    if not batch.gold_ids.numel():
        return gain
    logp, offsets = answer_tokens(pass_)
    level = segment_mean(logp.exp(), offsets)
    start = level[batch.question_leaf[batch.problem[known]]]
    gain[known] = (level[_last_leaf(pass_)[known]] - start).clamp(0.0, 1.0).to(gain.dtype)
    return gain


@register(
    "answer-gain-rlt",
    axis="adaptability",
    needs_leaf_hidden=True,
    needs_gold=True,
    aggregation="mean and extreme over answer and rationale tokens; mean over rationales",
)
def rlt(pass_: Pass) -> Tensor:
    """Adaptability as the reward of the rationale as an explanation (RLT): [R], in nats."""
    nll, ends = pass_.stats.nll.detach(), pass_.batch.token_offsets
    known = pass_.batch.leaf_offsets.diff() > 0  # not in a problem without a gold answer
    reward = nll.new_zeros(len(known))
    if not pass_.batch.gold_ids.numel():
        return reward
    logp, offsets = answer_tokens(pass_)
    last = _last_leaf(pass_)[known]
    unlikeliest = torch.stack([part.min() for part in logp.split(offsets.diff().tolist())])
    told = segment_mean(logp, offsets)[last] + RLT_EXTREME * unlikeliest[last]
    largest = torch.stack([part.max() for part in nll.split(ends.diff().tolist())])
    surprise = segment_mean(nll, ends) + RLT_EXTREME * largest
    reward[known] = (told - RLT_PENALTY * surprise[known]).to(reward.dtype)
    return reward
