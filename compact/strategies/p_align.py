"""P-ALIGN: the shortest sufficient prefix of a teacher's rationale, continued by the student.

For a rationale of n steps, find the least i for which the first i steps are sufficient, by binary
search. The student continues from there at temperature .6. If the final answer is the gold one, the
student trains on prefix + continuation, else on the original rationale.

Source: P-ALIGN (arXiv 2601.10064). Judges of a prefix:

- `asked` (published): the student is asked whether the reasoning so far is enough and answers yes.
- `reaches`: one of n continuations of the student reaches the gold answer.
- `leaves` (ours, the default): the gold answer's mean log-likelihood after the prefix, I_i of
  docs/method.md, is at least log(`level`). One forward gives it for all prefixes, so nothing is
  searched.

Binary search assumes that a longer prefix of a sufficient one is sufficient too. The log counts the
rationales for which the judge was not `monotone`: with `leaves` over all prefixes, else over the
prefixes asked about (`search: all` asks about all). Ours too: the original rationale is kept where
no continuation is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

from compact.data import Problem, text_of
from compact.passes import EncodedProblem, EncodedRationale
from compact.passes.encode import encode_problem
from compact.passes.forward import observe
from compact.strategies.base import register_strategy
from compact.strategies.building import Builder, Counts
from compact.student import Student
from compact.student.generation import generate, seed_of

QUESTION = "\nIs the reasoning so far enough to answer the question? Answer yes or no: "
JUDGES = ("leaves", "reaches", "asked")


def shortest_prefix(
    judge: Callable[[int], bool], steps: int, *, every: bool = False
) -> tuple[int | None, bool]:
    """Finds the least number of steps that the judge calls sufficient.

    Args:
        judge: number of steps, 0 to `steps` -> whether they are sufficient.
        steps: n, the steps of the rationale.
        every: whether to ask about every prefix instead of a binary search.

    Returns:
        The number of steps, None if all n are not sufficient; and whether no prefix that was asked
        about is insufficient although a shorter one is sufficient.
    """
    asked: dict[int, bool] = {}

    def ask(count: int) -> bool:
        return asked.setdefault(count, judge(count)) if count not in asked else asked[count]

    if every:
        for count in range(steps + 1):
            ask(count)
        found = next((count for count in range(steps + 1) if asked[count]), None)
    else:
        low, high = 0, steps
        while low < high:
            middle = (low + high) // 2
            if ask(middle):
                high = middle
            else:
                low = middle + 1
        found = low if ask(low) else None
    verdicts = [asked[count] for count in sorted(asked)]
    return found, verdicts == sorted(verdicts)


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
    ) -> None:
        """Sets up the judge.

        Args:
            judge: "leaves", "reaches" or "asked".
            level: least mean probability of a token of the gold answer, for `leaves`.
            samples: continuations that the student writes of each prefix.
            temperature: of the continuations.
            max_new_tokens: most tokens of a continuation.
            search: "binary", or "all" to ask about every prefix.

        Raises:
            ValueError: a value is not allowed.
        """
        if judge not in JUDGES:
            raise ValueError(f"judge of p-align must be one of {', '.join(JUDGES)}, got {judge!r}")
        if search not in ("binary", "all"):
            raise ValueError(f"search of p-align must be binary or all, got {search!r}")
        if not 0.0 < level <= 1.0:
            raise ValueError(f"level of p-align must be above 0 and at most 1, got {level!r}")
        if samples < 1:
            raise ValueError(f"samples of p-align must be at least 1, got {samples!r}")
        super().__init__(
            judge=judge,
            level=level,
            samples=samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            search=search,
        )
        self.judge, self.level, self.samples = judge, level, samples
        self.temperature, self.max_new_tokens, self.search = temperature, max_new_tokens, search

    def build(self, problem: Problem, student: Student) -> tuple[list[str], Counts]:
        """Returns the rationales from the student's hand on, where they reach the gold answer."""
        encoded = encode_problem(
            problem, student.tokenizer, max_length=self.max_length, leaf_budget=math.inf
        )
        prefixes, counts = self._prefixes(problem, encoded, student)
        texts = []
        for k, (rationale, prefix) in enumerate(zip(encoded.rationales, prefixes, strict=True)):
            text = None
            if prefix is not None and prefix < len(rationale.steps):
                text = self._continued(problem, encoded, student, k, prefix)
            texts.append(text if text is not None else text_of(problem.rationales[k].completion))
            counts["prefixes kept"] += text is not None
            if text is not None:
                counts["share of steps kept"] += float(prefix or 0) / len(rationale.steps)
        return texts, counts

    def _prefixes(
        self, problem: Problem, encoded: EncodedProblem, student: Student
    ) -> tuple[list[int | None], Counts]:
        counts: Counts = dict.fromkeys(
            ("rationales", "never sufficient", "not monotone", "prefixes kept"), 0.0
        )
        counts["share of steps kept"] = 0.0
        levels = _levels(encoded, student) if self.judge == "leaves" else []
        found: list[int | None] = []
        for k, rationale in enumerate(encoded.rationales):
            if self.judge == "leaves":
                enough = [level >= math.log(self.level) for level in levels[k]]
                prefix, monotone = shortest_prefix(enough.__getitem__, len(enough) - 1, every=True)
            else:
                prefix, monotone = shortest_prefix(
                    self._judge(problem, encoded, student, k),
                    len(rationale.steps),
                    every=self.search == "all",
                )
            counts["rationales"] += 1
            counts["never sufficient"] += prefix is None
            counts["not monotone"] += not monotone
            found.append(prefix)
        return found, counts

    def _judge(
        self, problem: Problem, encoded: EncodedProblem, student: Student, k: int
    ) -> Callable[[int], bool]:
        rationale = encoded.rationales[k]

        @cache
        def reaches(steps: int) -> bool:
            return self._continued(problem, encoded, student, k, steps) is not None

        @cache
        def asked(steps: int) -> bool:
            tokenizer = student.tokenizer
            question = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
            ids = [*encoded.prompt_ids, *_prefix_ids(rationale, steps), *question]
            (answer,) = generate(student.model, tokenizer, [ids], 4)
            return str(tokenizer.decode(answer)).strip().lower().startswith("yes")

        return reaches if self.judge == "reaches" else asked

    def _continued(
        self, problem: Problem, encoded: EncodedProblem, student: Student, k: int, steps: int
    ) -> str | None:
        """Returns the first of n texts, prefix and continuation, that reaches the gold answer."""
        tokenizer = student.tokenizer
        prefix = _prefix_ids(encoded.rationales[k], steps)
        answers = generate(
            student.model,
            tokenizer,
            [[*encoded.prompt_ids, *prefix]] * self.samples,
            self.max_new_tokens,
            temperature=self.temperature,
            seed=seed_of(self.seed, problem.question_id, encoded.rationales[k].teacher, steps),
        )
        texts = [str(tokenizer.decode([*prefix, *a], skip_special_tokens=True)) for a in answers]
        domain = problem.domain
        return next((t for t in texts if domain.matches(domain.extract(t), problem.answer)), None)


def _prefix_ids(rationale: EncodedRationale, steps: int) -> Sequence[int]:
    """Returns the tokens of the first `steps` steps."""
    return rationale.ids[: rationale.steps[steps - 1][1]] if steps else ()


def _levels(encoded: EncodedProblem, student: Student) -> list[list[float]]:
    """Returns for each rationale the levels I_0 (bare question), I_1, ... I_n, nats per token."""
    pass_ = observe(student, [encoded], layout="padded")
    offsets, levels = pass_.batch.leaf_offsets.tolist(), pass_.leaf_logp.tolist()
    question = levels[int(pass_.batch.question_leaf[0])]
    return [[question, *levels[a:b]] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
