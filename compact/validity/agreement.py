"""How far a rationale agrees with the others that count, in numbers and words.

C_k = sum_j w_j s(k, j) / sum_j w_j over the rationales j of the problem with another text, w_j how
likely j's answer is. The similarity s depends on the answers:

- If both have a number, s is the Jaccard index of the numbers in steps and answer.
- Otherwise s is the mean of this index and of the cosine of the words' tf-idf vectors ((1 + log tf)
  log(N / df) over the N rationales of the data). If neither text has a number, it is the cosine.

Source: this project. A wrong number changes the set of numbers, but hardly the words or hidden
states. Words show style more than errors: even a right text shares fewer words with the others if
it is short. When words were always compared, the right rationales of svamp's human-equation, which
are half as long as the others, had .54 of an even weight; now they have .96.

AUC of C alone before and now (part 1 of 2): asdiv .936, .941; gsm8k .776, .816; svamp12 .964, .959;
math_l5 .880, .881. Two variants were worse. If numbers alone are compared wherever both texts have
some, openbookqa (41 questions) falls from .772 to .585: where answers are letters or words, the
numbers in a text say little. If the smaller set replaces the union in the Jaccard index, asdiv is
at .902 and svamp12 at .930.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

from compact.text.equations import numbers
from compact.validity.cases import Case, Solution

_WORD = re.compile(r"[^\W\d_]+|\d+(?:\.\d+)?")


def document_frequencies(cases: Iterable[Case]) -> tuple[Counter[str], int]:
    """Returns how many rationales of the data have each word, and their number."""
    found: Counter[str] = Counter()
    total = 0
    for case in cases:
        for rationale in case.rationales:
            found.update(set(_words(rationale.text)))
            total += 1
    return found, total


def agreement(
    case: Case, weights: Sequence[float], frequencies: tuple[Counter[str], int]
) -> list[float]:
    """Returns [K] C_k in 0..1; 1 where no other rationale counts.

    Args:
        case: the problem.
        weights: [K] w_j >= 0.
        frequencies: of the whole data.
    """
    read = [_Read(r, frequencies) for r in case.rationales]
    texts = [r.text for r in case.rationales]
    scores = []
    for k in range(len(read)):
        total = agreed = 0.0
        for j, weight in enumerate(weights):
            if texts[j] != texts[k] and weight > 0:
                total += weight
                agreed += weight * _similarity(read[k], read[j])
        scores.append(agreed / total if total else 1.0)
    return scores


class _Read:
    """What is compared of a rationale.

    Attributes:
        numbers: those of its steps and answer.
        counts: whether its answer has a number.
    """

    def __init__(self, rationale: Solution, frequencies: tuple[Counter[str], int]) -> None:
        of_answer = numbers(rationale.answer or "")
        self.numbers = frozenset(of_answer).union(*map(numbers, rationale.step_texts))
        self.counts = bool(of_answer)
        self._text, self._frequencies = rationale.text, frequencies

    @cached_property
    def words(self) -> dict[str, float]:
        """The vector of its words, of length 1; most problems with numbers do not need it."""
        return _vector(self._text, *self._frequencies)


def _similarity(a: _Read, b: _Read) -> float:
    either = a.numbers | b.numbers
    shared = len(a.numbers & b.numbers) / len(either) if either else 0.0
    if a.counts and b.counts:
        return shared
    cosine = sum(x * b.words.get(word, 0.0) for word, x in a.words.items())
    return 0.5 * (cosine + shared) if either else cosine


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _vector(text: str, documents: Counter[str], total: int) -> dict[str, float]:
    """Returns the tf-idf vector of a text, of length 1 (0 if every word is in every document)."""
    counts = Counter(_words(text))
    # A word that is in none of the counted texts is as rare as one that is in one of them.
    rare = {w: math.log(total / max(documents[w], 1)) for w in counts}
    vector = {w: (1 + math.log(n)) * rare[w] for w, n in counts.items()}
    length = math.sqrt(sum(x * x for x in vector.values()))
    return {w: x / length for w, x in vector.items()} if length else {}
