"""Control: how often a rationale checks, wonders and concludes, by a count of words.

W_k = 100 (0.20 verify + 0.25 explore + 0.25 connect) / words. verify counts "check" and "verify"
with their endings, explore counts "perhaps" and "might", connect counts "therefore" and "since".
Source: the rule by which LIMO (arXiv 2502.03387) scored reasoning chains, with the words that it
names. Its fourth part, length with a share of 0.30, is left out: the paper does not say how it is
scaled, and `length` is a control of its own. Higher is better.
"""

from __future__ import annotations

import re

from torch import Tensor

from compact.metrics import register
from compact.passes import Pass
from compact.passes.transfer import put

PARTS = (
    (0.20, re.compile(r"check(?:s|ed|ing)?|verif(?:y|ies|ied|ying|ication)")),
    (0.25, re.compile(r"perhaps|might")),
    (0.25, re.compile(r"therefore|since")),
)
"""Share and words of each part."""
_WORD = re.compile(r"[^\W\d_]+")


def word_score(text: str) -> float:
    """Returns W of a text; 0 if it has no words."""
    words = _WORD.findall(text.lower())
    found = sum(share for word in words for share, part in PARTS if part.fullmatch(word))
    return 100.0 * found / len(words) if words else 0.0


@register("checking-words", axis="control", aggregation="mean over words; mean over rationales")
def checking_words(pass_: Pass) -> Tensor:
    """Returns [R] weighted count of words per hundred words."""
    scores = [word_score(r.text) for p in pass_.batch.problems for r in p.rationales]
    return put(scores, pass_.batch.target)
