"""Adaptability as the gain of the gold option from what a rationale says without its answer.

The score is M(x, y') - M(x), with the contrast M of `option-contrast`. y' has the steps of y that
state no answer: those before the first statement and, read as if the statement were not there,
those after it. A step states an answer if it announces one ("The answer is"), is an option and no
more, or concludes an option ("so B is correct"); see `Domain.states` in `compact.answers`. All
options count, not only the gold one, so a rationale cannot hide behind a wrong conclusion.

A text that only states the answer scores exactly 0: nothing of it is read. A plain likelihood gain
prefers such a text to a real rationale (RORA, arXiv 2402.18678). docs/leaks.md has the measurement.
Source: this project.
"""

from __future__ import annotations

from torch import Tensor

from compact.metrics import register
from compact.metrics.option_contrast import contrast_gain, option_leaves
from compact.passes import Pass


@register("leak-adjusted", axis="adaptability", needs_options=True, needs_gold=True)
def leak_adjusted(pass_: Pass) -> Tensor:
    """Returns [R] M(x, y') - M(x) in nats; 0 if every step states an answer."""
    return contrast_gain(pass_, option_leaves(pass_, "leak-adjusted")[0].unstated)
