"""Adaptability as the gain of the gold option over the others, each asked for by its text.

s(o | x, y) is the mean log-likelihood of the tokens of option o after question x, rationale y and a
cue, in nats. M(x, y) = s(gold) - logsumexp over the other options of s. The score is M(x, y) -
M(x). Small students are near chance on option letters, so the text is asked for (cloze form).
Source: this project.

A rationale that only states the answer scores high: see `leak-adjusted` for one that is not fooled.
A rationale of a problem without options or without a gold answer scores 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact.metrics import register
from compact.passes import Pass
from compact.passes.types import OptionLeaves


def option_leaves(pass_: Pass, metric: str) -> tuple[OptionLeaves, Tensor]:
    """Returns the option leaves of a pass and their log-likelihoods [N].

    Raises:
        ValueError: the batch was built without option leaves.
    """
    leaves, logp = pass_.batch.options, pass_.option_logp
    if leaves is None or logp is None:
        raise ValueError(f"{metric}: batch must be built with options=True, got no option leaves")
    return leaves, logp


def contrasts(pass_: Pass) -> Tensor:
    """Returns [E] the contrast M at each place of option leaves; 0 where no option is gold."""
    leaves, logp = option_leaves(pass_, "option-contrast")
    gold = leaves.gold[problem_of_place(pass_)].tolist()
    found = []
    for scores, right in zip(logp.split(leaves.offsets.diff().tolist()), gold, strict=True):
        if right < 0:
            found.append(scores.new_zeros(()))
            continue
        others = torch.cat([scores[:right], scores[right + 1 :]])
        found.append(scores[right] - others.logsumexp(0))
    return torch.stack(found)


def problem_of_place(pass_: Pass) -> Tensor:
    """Returns [E] the problem of each place of option leaves."""
    batch = pass_.batch
    leaves = option_leaves(pass_, "option leaves")[0]
    problem = torch.zeros_like(leaves.offsets[1:])
    problem[leaves.unstated] = batch.problem
    problem[leaves.whole] = batch.problem
    problem[leaves.question] = torch.arange(len(batch.problems), device=problem.device)
    return problem


def contrast_gain(pass_: Pass, places: Tensor) -> Tensor:
    """Returns [R] M at the place of each rationale minus M after its question alone, nats."""
    contrast = contrasts(pass_)
    leaves = option_leaves(pass_, "option-contrast")[0]
    return contrast[places] - contrast[leaves.question][pass_.batch.problem]


@register("option-contrast", axis="adaptability", needs_options=True, needs_gold=True)
def option_contrast(pass_: Pass) -> Tensor:
    """Returns [R] M(x, y) - M(x) in nats."""
    return contrast_gain(pass_, option_leaves(pass_, "option-contrast")[0].whole)
