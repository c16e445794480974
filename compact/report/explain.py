"""Analyses single problems for the report: how each token changes the gold answer's likelihood."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compact.metrics.gain import step_gains
from compact.metrics.step_graph import step_graphs
from compact.passes import EncodedProblem, EncodedRationale, Pass
from compact.passes.forward import observe
from compact.passes.packing import Layout
from compact.student import Student


@dataclass(frozen=True)
class Token:
    """A token of a rationale.

    Attributes:
        text: the text that the token adds.
        gain: c_t - c_{t-1} in nats, where c_t is the mean log-likelihood of the gold answer's
            tokens right after the student has read token t; 0 at the last token, and without a gold
            answer.
        step: index of its step, -1 outside every step.
    """

    text: str
    gain: float
    step: int


@dataclass(frozen=True)
class ExplainedStep:
    """A reasoning step.

    Attributes:
        text: text of the step.
        level: I_i, nats; None where the leaf budget left no answer leaf after the step.
        gain: I_i minus the level of the leaf before it, nats; None without a leaf.
        epiphany: whether the step is an epiphany step.
        support: share of the problem's rationales that have a step in its class.
        mainstream: whether its class is on the mainstream path.
    """

    text: str
    level: float | None
    gain: float | None
    epiphany: bool
    support: float
    mainstream: bool


@dataclass(frozen=True)
class ExplainedRationale:
    """A rationale: its teacher, the final answer found in it, its tokens and its steps."""

    teacher: str
    answer: str | None
    tokens: tuple[Token, ...]
    steps: tuple[ExplainedStep, ...]


@dataclass(frozen=True)
class ExplainedProblem:
    """A problem as a student sees it.

    Attributes:
        question_id, prompt: as encoded.
        gold: None without a gold answer.
        start: I_0, the level after the question alone (nats); None without a gold answer.
        rationales: the K rationales.
        matches: pairs of steps that match; steps are numbered over all rationales in order.
    """

    question_id: str
    prompt: str
    gold: str | None
    start: float | None
    rationales: tuple[ExplainedRationale, ...]
    matches: tuple[tuple[int, int], ...]


def token_texts(ids: tuple[int, ...], processing_class: Any) -> list[str]:
    """Returns the text that each token adds.

    If several tokens form one character, the last of them gets the character.
    """
    texts, done = [], ""
    for end in range(1, len(ids) + 1):
        text = processing_class.decode(ids[:end], skip_special_tokens=True)
        if text.endswith("\ufffd"):
            texts.append("")
            continue
        texts.append(text[len(done) :])
        done = text
    return texts


def explain_problem(
    student: Student, processing_class: Any, problem: EncodedProblem, layout: Layout
) -> ExplainedProblem:
    """Runs the student over a problem and returns the gain of every token and step.

    Args:
        student: the student.
        processing_class: its tokenizer.
        problem: a problem with K rationales.
        layout: layout of the batch.
    """
    pass_ = observe(student, [problem], layout=layout)
    return ExplainedProblem(
        question_id=problem.question_id,
        prompt=problem.prompt,
        gold=problem.gold,
        start=None if problem.gold is None else float(step_gains(pass_).start[0]),
        rationales=tuple(
            _explain_rationale(pass_, r, rationale, processing_class)
            for r, rationale in enumerate(problem.rationales)
        ),
        matches=tuple((i, j) for i, j in step_graphs(pass_)[1].matches.tolist()),
    )


def _explain_rationale(
    pass_: Pass, r: int, rationale: EncodedRationale, processing_class: Any
) -> ExplainedRationale:
    assert pass_.stats.gold_logp is not None
    span = slice(*pass_.batch.token_offsets[r : r + 2].tolist())
    # Row m predicts token m, so row m + 1 is the state right after token m.
    level = pass_.stats.gold_logp[span].float()
    gain = [*level.diff().tolist(), 0.0]
    texts = token_texts(rationale.ids, processing_class)
    found = step_gains(pass_)
    leaves = slice(*found.offsets[r : r + 2].tolist())
    level_of, gain_of, epiphany_of = (
        dict(zip(rationale.asked_steps, column[leaves].tolist(), strict=True))
        for column in (found.level, found.gain, found.epiphany)
    )
    described, graphs = step_graphs(pass_)
    classes = graphs.step_class[slice(*described.step_offsets[r : r + 2])]
    return ExplainedRationale(
        teacher=rationale.teacher,
        answer=rationale.answer,
        tokens=tuple(
            Token(*values)
            for values in zip(texts, gain, pass_.batch.step[span].tolist(), strict=True)
        ),
        steps=tuple(
            ExplainedStep(
                text=text,
                level=level_of.get(i),
                gain=gain_of.get(i),
                epiphany=epiphany_of.get(i, False),
                support=float(graphs.support[classes[i]]),
                mainstream=bool(graphs.mainstream[classes[i]]),
            )
            for i, text in enumerate(rationale.step_texts)
        ),
    )
