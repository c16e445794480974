"""P-ALIGN: the shortest sufficient prefix of a teacher's rationale, continued by the student.

For a rationale of n steps, find the least i for which the first i steps are sufficient, by binary
search. The student continues from there at temperature .6. If the final answer is the gold one, the
student trains on prefix + continuation, else on the original rationale.

Source: P-ALIGN (arXiv 2601.10064). Judges of a prefix:

- `asked` (published): the student is asked whether the reasoning so far is enough and answers yes.
- `reaches`: one of n continuations of the student reaches the gold answer.
- `leaves` (ours, the default): the gold answer's mean log-likelihood after the prefix, I_i of
  docs/method.md, is at least log(`level`). One forward gives it for all prefixes, so nothing is
  searched. A student that cannot use trees needs several.

Binary search assumes that a longer prefix of a sufficient one is sufficient too. The log counts the
rationales for which the judge was not `monotone`: with `leaves` over all prefixes, else over the
prefixes asked about (`search: all` asks about all). Ours too: the original rationale is kept where
no continuation is right, and a `writer` may be asked and continue in place of the student, such as
the student itself on a server.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from compact.data import Problem, text_of
from compact.options import check_number
from compact.passes import EncodedProblem, EncodedRationale
from compact.passes.encode import encode_problem
from compact.passes.forward import observe
from compact.passes.layout import choose_layout
from compact.passes.packing import Layout
from compact.strategies.base import register_strategy
from compact.strategies.building import Builder, Built, Counts, reads_gold
from compact.student import Student
from compact.student.generation import generate_in_room, seed_of
from compact.teachers.tasks import Task, Work

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.weighting import Weigher

ASKED = """Question:
{question}

The beginning of a solution:
{prefix}

Is this reasoning enough to answer the question without further help? Answer yes or no."""
CONTINUE = """Question:
{question}

The beginning of a solution:
{prefix}

Continue this solution from where it stops. Write only what follows, in the same style, without
repeating the beginning. End with "The answer is" and the answer."""
QUESTION = "\nIs the reasoning so far enough to answer the question? Answer yes or no: "
JUDGES = ("leaves", "reaches", "asked")
_OF_STEPS = ("steps kept", "steps")  # counts over the rationales whose prefix is kept
_MOST_TOKENS = 16_384  # of the padded rows of a forward with leaves


def shortest_prefix(
    judge: Callable[[int], Work[bool]], steps: int, *, every: bool = False
) -> Work[tuple[int | None, bool]]:
    """Finds the least number of steps that the judge calls sufficient.

    Args:
        judge: number of steps, 0 to `steps` -> whether they are sufficient; it may yield tasks.
        steps: n, the steps of the rationale.
        every: whether to ask about every prefix instead of a binary search.

    Returns:
        The number of steps, None if all n are not sufficient; and whether no prefix that was asked
        about is insufficient although a shorter one is sufficient.
    """
    asked: dict[int, bool] = {}
    low, high = 0, steps
    for count in range(steps + 1) if every else ():
        asked[count] = yield from judge(count)
    while low < high:
        middle = (low + high) // 2
        if middle not in asked:
            asked[middle] = yield from judge(middle)
        low, high = (low, middle) if asked[middle] else (middle + 1, high)
    if low not in asked:
        asked[low] = yield from judge(low)
    found = next((count for count in range(steps + 1) if asked[count]), None) if every else low
    verdicts = [asked[count] for count in sorted(asked)]
    return found if found is not None and asked[found] else None, verdicts == sorted(verdicts)


@register_strategy("p-align")
class PrefixAlign(Builder):
    """The student continues each rationale from its shortest sufficient prefix."""

    needs = ("gold", "rollouts")
    name = "p-align"

    def __init__(
        self,
        judge: str = "leaves",
        level: float = 0.5,
        samples: int = 4,
        temperature: float = 0.6,
        max_new_tokens: int = 256,
        search: str = "binary",
        writer: str = "student",
        budget: float | None = None,
    ) -> None:
        """Sets up the judge.

        Args:
            judge: "leaves", "reaches" or "asked".
            level: least mean probability of a token of the gold answer, for `leaves`.
            samples: continuations that the student writes of each prefix.
            temperature: of the continuations; 0 for the likeliest one only.
            max_new_tokens: most tokens of a continuation.
            search: "binary", or "all" to ask about every prefix.
            writer: who is asked and who continues: "student"; FILE.yaml:TEACHER, a teacher of
                `compact collect`, whose `n`, `temperature` and `max_tokens` then count; or
                MODULE:FUNCTION, a function from requests to as many texts.
            budget: most that the teacher's store may cost in all.

        Raises:
            ValueError: a value is not allowed, or there is no such writer.
            OSError: the file of teachers cannot be read.
        """
        if judge not in JUDGES:
            raise ValueError(f"judge of p-align must be one of {', '.join(JUDGES)}, got {judge!r}")
        if search not in ("binary", "all"):
            raise ValueError(f"search of p-align must be binary or all, got {search!r}")
        check_number("level of p-align", level, above=0, most=1)
        check_number("samples of p-align", samples, least=1, whole=True)
        check_number("temperature of p-align", temperature, least=0)
        super().__init__(
            writer,
            budget,
            judge=judge,
            level=level,
            samples=samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            search=search,
        )
        self.judge, self.level, self.samples = judge, level, samples
        self.temperature, self.max_new_tokens, self.search = temperature, max_new_tokens, search
        self._asked_layout = "auto"
        self._layout: Layout | None = None  # of the student; chosen when it is first needed

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Keeps the layout that is asked for, besides what every builder keeps."""
        super().check(weigher, args)
        self._asked_layout = args.layout

    def build(self, problem: Problem, student: Student) -> Built:
        """Returns the rationales from the student's hand on; None where no one is right."""
        encoded = encode_problem(
            problem, student.tokenizer, max_length=self.max_length, leaf_budget=math.inf
        )
        levels = self._levels(encoded, student) if self.judge == "leaves" else []
        names = ("rationales", "never sufficient", "not monotone", "prefixes kept")
        counts: Counts = dict.fromkeys((*names, *_OF_STEPS), 0.0)
        texts = []
        for k, rationale in enumerate(encoded.rationales):
            prefixes = _Prefixes(self, problem, encoded, student, k)
            if self.judge == "leaves":
                enough = [level >= math.log(self.level) for level in levels[k]]
                judge, every, steps = _known(enough), True, len(enough) - 1
            else:
                judge = prefixes.reaches if self.judge == "reaches" else prefixes.asked
                every, steps = self.search == "all", len(rationale.steps)
            prefix, monotone = yield from shortest_prefix(judge, steps, every=every)
            text = None
            if prefix is not None and prefix < len(rationale.steps):
                text = yield from prefixes.continued(prefix)
            counts["rationales"] += 1
            counts["never sufficient"] += prefix is None
            counts["not monotone"] += not monotone
            counts["prefixes kept"] += text is not None
            if text is not None:
                counts["steps kept"] += prefix or 0
                counts["steps"] += len(rationale.steps)
            texts.append(text)
        return texts, counts

    def take_log(self) -> dict[str, float]:
        """Returns the sums of the counts, and the share of steps of the prefixes kept, once."""
        found = super().take_log()
        kept, steps = (found.pop(name, 0.0) for name in _OF_STEPS)
        return found | ({"share of steps kept": kept / steps} if steps else {})

    def _levels(self, encoded: EncodedProblem, student: Student) -> list[list[float]]:
        """Returns `levels_of`, in the layout that suits the student."""
        if self._layout is None:
            self._layout, _ = choose_layout(student, self._asked_layout, self.max_length)
        return levels_of(encoded, student, self._layout)


class _Prefixes:
    """The prefixes of one rationale: asked about, and continued, by the student or the writer.

    The student gets the tokens of the prefix; a writer gets its text in a request.
    """

    def __init__(
        self,
        settings: PrefixAlign,
        problem: Problem,
        encoded: EncodedProblem,
        student: Student,
        k: int,
    ) -> None:
        self._of, self._problem, self._encoded = settings, problem, encoded
        self._student, self._rationale = student, encoded.rationales[k]
        self._found: dict[int, str | None] = {}

    def reaches(self, steps: int) -> Work[bool]:
        """Whether a continuation is right."""
        return (yield from self.continued(steps)) is not None

    def asked(self, steps: int) -> Work[bool]:
        """Whether who is asked says that the prefix is enough."""
        tokenizer = self._student.tokenizer
        if self._of.writer:
            (found,) = yield [Task(self._filled(ASKED, steps), _yes)]
            return found is not None
        question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
        ids = [*self._encoded.prompt_ids, *_prefix_ids(self._rationale, steps), *question]
        (answer,) = generate_in_room(self._student.model, tokenizer, [ids], 4)
        return _yes(str(tokenizer.decode(answer))) is not None

    def continued(self, steps: int) -> Work[str | None]:
        """Returns the first text, prefix and continuation, that reaches the gold answer."""
        if steps not in self._found:
            right = reads_gold(self._problem)
            if self._of.writer:
                before = self._prefix(steps).rstrip()

                def read(text: str) -> str | None:
                    more = text.strip().removeprefix(before).lstrip()
                    return right(f"{before}\n{more}".lstrip())

                task = Task(self._filled(CONTINUE, steps), read)
                (self._found[steps],) = yield [task]
            else:
                texts = (right(text) for text in self._own(steps))
                self._found[steps] = next((text for text in texts if text is not None), None)
        return self._found[steps]

    def _own(self, steps: int) -> list[str]:
        """Returns the student's texts, prefix and continuation."""
        of, tokenizer = self._of, self._student.tokenizer
        prefix = _prefix_ids(self._rationale, steps)
        key = (of.seed, self._problem.question_id, self._rationale.teacher, steps)
        answers = generate_in_room(
            self._student.model,
            tokenizer,
            [[*self._encoded.prompt_ids, *prefix]] * of.samples,
            of.max_new_tokens,
            temperature=of.temperature,
            seeds=[seed_of(*key, i) for i in range(of.samples)],
        )
        return [str(tokenizer.decode([*prefix, *a], skip_special_tokens=True)) for a in answers]

    def _prefix(self, steps: int) -> str:
        ids = list(_prefix_ids(self._rationale, steps))
        return str(self._student.tokenizer.decode(ids, skip_special_tokens=True)).lstrip()

    def _filled(self, template: str, steps: int) -> str:
        question, prefix = text_of(self._problem.prompt), self._prefix(steps)
        return template.format(question=question, prefix=prefix or "(nothing yet)")


def _known(enough: Sequence[bool]) -> Callable[[int], Work[bool]]:
    """Returns a judge that asks nobody."""

    def judge(steps: int) -> Work[bool]:
        yield from ()
        return enough[steps]

    return judge


def _yes(text: str) -> str | None:
    return text if text.strip().lower().startswith("yes") else None


def _prefix_ids(rationale: EncodedRationale, steps: int) -> Sequence[int]:
    """Returns the tokens of the first `steps` steps."""
    return rationale.ids[: rationale.steps[steps - 1][1]] if steps else ()


def levels_of(encoded: EncodedProblem, student: Student, layout: Layout) -> list[list[float]]:
    """Returns for each rationale the levels I_0 (bare question), I_1, ... I_n, nats per token."""
    levels: list[list[float]] = [[] for _ in encoded.rationales]
    question = 0.0
    for k, part in _parts(encoded, layout):
        pass_ = observe(student, [part], layout=layout)
        offsets, found = pass_.batch.leaf_offsets.tolist(), pass_.leaf_logp.tolist()
        question = found[int(pass_.batch.question_leaf[0])]
        for own, (a, b) in zip(levels[k:], pairwise(offsets), strict=False):
            own += found[a:b]
    return [[question, *own] for own in levels]


def _parts(encoded: EncodedProblem, layout: Layout) -> Iterator[tuple[int, EncodedProblem]]:
    """Yields the forwards that ask after every step, each with the place of its first rationale.

    A tree has one. A padded row repeats the text before its leaf, so there each forward has few
    leaves of one rationale.
    """
    if layout == "tree":
        yield 0, encoded
        return
    for k, rationale in enumerate(encoded.rationales):
        at_once = max(_MOST_TOKENS // (len(encoded.prompt_ids) + len(rationale.ids)), 1)
        steps = range(len(rationale.steps))
        for first in range(0, len(steps), at_once):
            few = replace(rationale, leaf_steps=tuple(steps[first : first + at_once]))
            yield k, replace(encoded, rationales=(few,))
