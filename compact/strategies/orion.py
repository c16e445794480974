"""ORION: rationales are rewritten in view of the student's own wrong answers.

The student answers each question n times (n = 5, T = .8). If some answers are wrong, a writer reads
the question, the teacher's rationale and the wrong answers, reflects on where they go wrong and
writes the rationale again. The new text is kept if its answer is the gold one; else the original
stays.

Source: ORION (arXiv 2505.22131). The writer is the student itself, a teacher of teachers.yaml, or a
function of yours. Ours: the wording of the request.
"""

from __future__ import annotations

from compact.data import Problem, Text, text_of
from compact.data.problems import REASONING
from compact.options import check_number
from compact.passes.encode import encode_prompt
from compact.strategies.base import register_strategy
from compact.strategies.building import Builder, Built, Counts, reads_gold
from compact.student import Student
from compact.student.generation import generate_in_room, seed_of
from compact.teachers.tasks import Task

REQUEST = """Question:
{question}

A solution:
{rationale}

Wrong attempts of a student:
{attempts}

Say where the attempts go wrong. Then write the solution again, in small steps, so that this student
gets it right. End with "The answer is" and the answer."""


def _with_reasoning(completion: Text) -> str:
    """Returns a completion as one text, the reasoning of chat messages before their content."""
    if isinstance(completion, str):
        return completion
    parts = [
        part for message in completion for part in (message.get(REASONING), message["content"])
    ]
    return "\n".join(part for part in parts if part)


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
        budget: float | None = None,
    ) -> None:
        """Sets up samples and writer.

        Args:
            writer: "student"; FILE.yaml:TEACHER, a teacher of `compact collect`; or
                MODULE:FUNCTION, a function from requests to as many texts.
            samples: n, answers of the student to each question.
            temperature: of these answers; 0 for the likeliest one only.
            max_new_tokens: most tokens that the student writes at once.
            budget: most that the teacher's store may cost in all.

        Raises:
            ValueError: a value is not allowed, or there is no such writer.
            OSError: the file of teachers cannot be read.
        """
        check_number("samples of orion", samples, least=1, whole=True)
        check_number("temperature of orion", temperature, least=0)
        super().__init__(
            writer,
            budget,
            samples=samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
        )
        self.samples, self.temperature, self.max_new_tokens = samples, temperature, max_new_tokens

    def build(self, problem: Problem, student: Student) -> Built:
        """Returns the rewritten rationales, None where the answer is not the gold one."""
        originals = [_with_reasoning(r.completion) for r in problem.rationales]
        right = reads_gold(problem)
        wrong = list(dict.fromkeys(a for a in self._answers(problem, student) if right(a) is None))
        counts: Counts = {
            "wrong answers": float(len(wrong)),
            "rationales": float(len(originals)),
            "rewritten": 0.0,
            "rewritten but wrong": 0.0,
        }
        if not wrong:
            return [None] * len(originals), counts
        question, attempts = text_of(problem.prompt), "\n---\n".join(wrong)
        found = yield [
            Task(REQUEST.format(question=question, rationale=text, attempts=attempts), right)
            for text in originals
        ]
        counts["rewritten"] = float(sum(text is not None for text in found))
        counts["rewritten but wrong"] = len(originals) - counts["rewritten"]
        return list(found), counts

    def _answers(self, problem: Problem, student: Student) -> list[str]:
        """Returns the student's own answers to a question."""
        tokenizer = student.tokenizer
        found = generate_in_room(
            student.model,
            tokenizer,
            [encode_prompt(problem.prompt, tokenizer)] * self.samples,
            self.max_new_tokens,
            temperature=self.temperature,
            seeds=[seed_of(self.seed, problem.question_id, i) for i in range(self.samples)],
        )
        return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in found]
