"""ORION: rationales are rewritten in view of the student's own wrong answers.

The student answers each question n times (n = 5, T = .8). If some answers are wrong, a writer reads
the question, the teacher's rationale and the wrong answers, reflects on where they go wrong and
writes the rationale again. The new text is kept if its answer is the gold one; else the original
stays.

Source: ORION (arXiv 2505.22131). The writer is the student itself or a function of yours, for
example one that asks an endpoint. Ours: the wording of the request.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

from compact.data import Problem, text_of
from compact.passes.encode import encode_prompt
from compact.strategies.base import register_strategy
from compact.strategies.building import Builder, Counts
from compact.student import Student
from compact.student.generation import generate, seed_of

REQUEST = """Question:
{question}

A solution:
{rationale}

Wrong attempts of a student:
{attempts}

Say where the attempts go wrong. Then write the solution again, in small steps, so that this student
gets it right. End with "The answer is" and the answer."""

Writer = Callable[[Sequence[str]], Sequence[str]]


@register_strategy("orion")
class Orion(Builder):
    """Rationales are rewritten in view of the student's own wrong answers, checked by the gold."""

    needs = ("gold", "rollouts", "writer")
    name = "orion"

    def __init__(
        self,
        writer: str = "student",
        samples: int = 5,
        temperature: float = 0.8,
        max_new_tokens: int = 256,
    ) -> None:
        """Sets up samples and writer.

        Args:
            writer: "student", or MODULE:FUNCTION, a function from requests to as many texts.
            samples: n, answers of the student to each question.
            temperature: of these answers.
            max_new_tokens: most tokens of an answer and of a rewritten rationale.

        Raises:
            ValueError: a value is not allowed, or there is no such function.
        """
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples of orion must be a whole number above 0, got {samples!r}")
        super().__init__(
            writer=writer, samples=samples, temperature=temperature, max_new_tokens=max_new_tokens
        )
        self.samples, self.temperature, self.max_new_tokens = samples, temperature, max_new_tokens
        self.writer = None if writer == "student" else _function(writer)

    def build(self, problem: Problem, student: Student) -> tuple[list[str], Counts]:
        """Returns the rewritten rationales, and the originals where the answer is not the gold."""
        originals = [text_of(r.completion) for r in problem.rationales]
        prompt = encode_prompt(problem.prompt, student.tokenizer)
        answers = self._texts(student, [prompt] * self.samples, self.temperature, problem)
        wrong = list(dict.fromkeys(a for a in answers if not _right(problem, a)))
        counts: Counts = {
            "wrong answers": float(len(wrong)),
            "rationales": float(len(originals)),
            "rewritten": 0.0,
            "rewritten but wrong": 0.0,
        }
        if not wrong:
            return originals, counts
        attempts = "\n---\n".join(wrong)
        question = text_of(problem.prompt)
        requests = [
            REQUEST.format(question=question, rationale=text, attempts=attempts)
            for text in originals
        ]
        texts = []
        for original, text in zip(
            originals, self._written(student, requests, problem), strict=True
        ):
            kept = _right(problem, text)
            counts["rewritten"] += kept
            counts["rewritten but wrong"] += not kept
            texts.append(text if kept else original)
        return texts, counts

    def _written(
        self, student: Student, requests: Sequence[str], problem: Problem
    ) -> Sequence[str]:
        if self.writer is None:
            prompts = [encode_prompt(text, student.tokenizer) for text in requests]
            return self._texts(student, prompts, 0.0, problem)
        texts = self.writer(requests)
        if len(texts) != len(requests):
            raise ValueError(
                f"writer of orion must return a text for each of {len(requests)} requests, got "
                f"{len(texts)}"
            )
        return texts

    def _texts(
        self, student: Student, prompts: Sequence[Sequence[int]], temperature: float, p: Problem
    ) -> list[str]:
        tokenizer = student.tokenizer
        found = generate(
            student.model,
            tokenizer,
            prompts,
            self.max_new_tokens,
            temperature=temperature,
            seed=seed_of(self.seed, p.question_id),
        )
        return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]


def _right(problem: Problem, text: str) -> bool:
    return problem.domain.matches(problem.domain.extract(text), problem.answer)


def _function(name: str) -> Writer:
    module, colon, function = name.partition(":")
    try:
        found: Writer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"writer of orion must be student or MODULE:FUNCTION, got {name!r} ({error})"
        ) from None
    if not colon:
        raise ValueError(f"writer of orion must be student or MODULE:FUNCTION, got {name!r}")
    return found
