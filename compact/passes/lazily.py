"""Problems of large data, encoded when they are asked for.

Encoding and judging a rationale takes milliseconds: minutes before the first step for data that a
run may never see as a whole, and gigabytes for their token ids. So beyond `AT_ONCE` problems, only
a sample is encoded at the start. What the data say about teachers, checks and words is learned from
the sample (`compact.validity.Judge`), and every other problem is encoded and judged when the
loader asks for it, in its worker processes if there are any. A problem is therefore the same in
every epoch, process and resumed run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from tqdm import tqdm

from compact.data import Problem, text_of
from compact.passes.encode import encode_problem, encode_question, with_judgements
from compact.passes.types import EncodedProblem
from compact.validity import Judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEMPLATE = 100  # most tokens of a chat template
AT_ONCE = 1000
"""Most problems that are encoded at the start, and the size of the sample of larger data."""


class LazyProblems(Sequence[EncodedProblem]):
    """The encoded problems of the data, in order.

    Attributes:
        sample: those that were encoded at the start: all, or `AT_ONCE` at even distances.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        processing_class: PreTrainedTokenizerBase,
        *,
        judged: bool = True,
        **settings: Any,
    ) -> None:
        """Encodes the sample, and judges it.

        Args:
            problems: as in `encode_problem`.
            processing_class: as in `encode_problem`.
            judged: whether every rationale gets a `judgement`.
            settings: other arguments of `encode_problem`.

        Raises:
            ValueError, TypeError: as in `encode_problem`, for a problem of the sample; of any other
                one, if its prompt is too long. Other errors are raised when it is asked for.
        """
        self._problems, self._processing_class = problems, processing_class
        self._settings = settings
        count = len(problems)
        size = min(count, AT_ONCE)
        # At random: every second problem may be all of one kind, where two sources take turns.
        chosen = sorted(random.Random(0).sample(range(count), size))
        # Shown only where it takes a while, on a terminal as in `evaluate`.
        bar = tqdm(chosen, desc="encoding", unit="problem", delay=5.0, disable=None)
        encoded = [self._encode(i) for i in bar]
        self._judge = Judge(encoded) if judged else None
        if self._judge is not None:
            encoded = [
                with_judgements(problem, judgements)
                for problem, judgements in zip(encoded, self._judge.judged, strict=True)
            ]
        self._known = dict(zip(chosen, encoded, strict=True))
        # A token has at least one byte, so only long texts can be prompts of too many tokens.
        most = settings["max_length"]
        for i, problem in enumerate(problems):
            size = len(text_of(problem.prompt).encode()) + _TEMPLATE
            if i not in self._known and size >= most:
                encode_question(problem, processing_class, most)

    @property
    def sample(self) -> list[EncodedProblem]:
        """The problems that were encoded at the start."""
        return list(self._known.values())

    def __len__(self) -> int:
        return len(self._problems)

    @overload
    def __getitem__(self, index: int) -> EncodedProblem: ...

    @overload
    def __getitem__(self, index: slice) -> list[EncodedProblem]: ...

    def __getitem__(self, index: int | slice) -> EncodedProblem | list[EncodedProblem]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if index in self._known:
            return self._known[index]
        problem = self._encode(index)
        return problem if self._judge is None else with_judgements(problem, self._judge(problem))

    def _encode(self, index: int) -> EncodedProblem:
        return encode_problem(self._problems[index], self._processing_class, **self._settings)
