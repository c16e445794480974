"""A router: guesses from the words of a question which teacher serves it best.

It is a ridge regression from the words of a question (words and pairs of neighbours, hashed,
TF-IDF, unit length) to the weight of each teacher; the teacher of greatest predicted weight is
asked. The penalty is the one under which the asked teachers would have had the greatest weight,
each question predicted from the others (leave-one-out, in closed form). Where that is not better
than the best single teacher by a standard error, every question goes to that teacher.

Source of the idea: PerSyn (arXiv 2510.10925), which routes each prompt before anything is written.
Its router is a trained language model; this linear one is ours.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_DIMENSIONS = 4096
_PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_WORD = re.compile(r"[^\W\d_]+|\d+")


@dataclass(frozen=True)
class Router:
    """What was learned. Teachers are numbers 0 to K - 1.

    Attributes:
        idf: [D] inverse document frequencies.
        center: [D] mean features.
        slopes: [D, K] change of a teacher's weight with each feature; all 0 if the words do not
            help.
        mean: [K] mean weight of each teacher.
        expected: mean weight of the asked teacher on the questions learned from, each predicted
            from the others.
        single: the same for the best single teacher.
        at_random: the same for a teacher drawn at random.
    """

    idf: Array
    center: Array
    slopes: Array
    mean: Array
    expected: float
    single: float
    at_random: float

    @property
    def reads_words(self) -> bool:
        """Whether it chooses by the question; otherwise all go to the best single teacher."""
        return bool(self.slopes.any())

    def choose(self, texts: Sequence[str]) -> list[int]:
        """Returns the teacher to ask, for each question."""
        if not self.reads_words:
            return [int(self.mean.argmax())] * len(texts)
        return [
            int(
                (
                    self.mean + (_scaled(_counts([text]), self.idf)[0] - self.center) @ self.slopes
                ).argmax()
            )
            for text in texts
        ]


def fit_router(texts: Sequence[str], weights: Array) -> Router:
    """Learns which teacher serves which question.

    Args:
        texts: N >= 2 questions.
        weights: [N, K] how well each teacher served each question.

    Raises:
        ValueError: there are fewer than two questions.
    """
    n = len(texts)
    if n < 2:
        raise ValueError(f"a router must learn from at least 2 questions, got {n}")
    counts = _counts(texts)
    idf = np.log((1 + n) / (1 + (counts > 0).sum(0))) + 1
    features = _scaled(counts, idf)
    center, mean = features.mean(0), weights.mean(0)
    x, y = features - center, weights - mean
    values, vectors = np.linalg.eigh(x @ x.T)
    values = values.clip(min=0)

    each = np.arange(n)
    of_single = weights[each, ((weights.sum(0) - weights) / (n - 1)).argmax(1)]
    best, chosen = None, of_single
    for penalty in _PENALTIES:
        hat = (vectors * (values / (values + penalty))) @ vectors.T + 1 / n
        # Leave-one-out prediction of ridge regression: y_i - (y_i - fit_i) / (1 - hat_ii).
        left_out = weights - (weights - hat @ weights) / (1 - hat.diagonal())[:, None]
        found = weights[each, left_out.argmax(1)]
        if found.mean() > chosen.mean():
            best, chosen = penalty, found
    gain = chosen - of_single
    slopes = np.zeros((features.shape[1], weights.shape[1]))
    if best is not None and gain.mean() > gain.std(ddof=1) / math.sqrt(n):
        slopes = x.T @ ((vectors / (values + best)) @ (vectors.T @ y))
    else:
        chosen = of_single
    of = (chosen.mean(), of_single.mean(), weights.mean())
    return Router(idf, center, slopes, mean, *map(float, of))


def _counts(texts: Sequence[str]) -> Array:
    """Returns [N, D]: how often each word and pair occurs. A number counts by its digits only."""
    counts = np.zeros((len(texts), _DIMENSIONS))
    for row, text in enumerate(texts):
        words = _WORD.findall(text.lower())
        words = [f"#{len(word)}" if word.isdigit() else word for word in words]
        for term in [*words, *map(" ".join, zip(words, words[1:], strict=False))]:
            counts[row, zlib.crc32(term.encode()) % _DIMENSIONS] += 1
    return counts


def _scaled(counts: Array, idf: Array) -> Array:
    """Returns TF-IDF features of unit length."""
    found = np.log1p(counts) * idf
    length: Array = np.linalg.norm(found, axis=1, keepdims=True)
    scaled: Array = found / length.clip(min=1e-12)
    return scaled
