"""The leak zoo: variants of real rationales that differ in whether they give reasons or leak.

For questions with options or yes / no answers, every variant is built from the same right rationale
(its reasons, without the statement of the answer):

- `gold`: the reasons, then the answer.
- `gold-leak`: the answer, then the reasons, then the answer.
- `vacuous`: the question in other words, then the answer.
- `leak-only`: the answer, nothing else.
- `wrong-facts`: the reasons for another question, then the answer.
- `swapped`: the reasons, then another option as the answer.
- `other`: the whole rationale of another question.

A score that finds good reasons puts `gold` and `gold-leak` above `vacuous` and `leak-only`. The
likelihood of the gold answer puts `leak-only` first.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from compact.answers import Alternative
from compact.data import Problem
from compact.data.problems import Rationale, text_of
from compact.text.steps import find_marker, split_steps

KINDS = ("gold", "gold-leak", "vacuous", "leak-only", "wrong-facts", "swapped", "other")
_FEWEST_REASONS = 2


def leak_zoo(problems: Sequence[Problem], *, seed: int, limit: int) -> list[Problem]:
    """Builds the zoo: for each question one rationale of each kind; the teacher is the kind.

    Args:
        problems: real problems; those without options, without a right rationale in text form, or
            without two steps of reasons in it are left out.
        seed: sets which questions, rationales and wrong options are drawn.
        limit: most questions.

    Raises:
        ValueError: fewer than two problems can be used.
    """
    rng = random.Random(seed)
    usable = []
    for problem in rng.sample(list(problems), len(problems)):
        reasons = list(_reasons(problem))
        if reasons:
            usable.append((problem, rng.choice(reasons)))
        if len(usable) == max(limit, 2):
            break
    if len(usable) < 2:
        raise ValueError(
            "problems must hold two questions with options and a right rationale of "
            f"{_FEWEST_REASONS} steps or more, got {len(usable)}"
        )
    zoo = []
    for i, (problem, body) in enumerate(usable[:limit]):
        donor, foreign = usable[i - 1]
        gold, wrong = _gold_and_others(problem)
        answer, swapped = _statement(gold), _statement(rng.choice(wrong))
        texts = {
            "gold": f"{body} {answer}",
            "gold-leak": f"{answer} {body} {answer}",
            "vacuous": f"{_restated(problem)} {answer}",
            "leak-only": answer,
            "wrong-facts": f"{foreign} {answer}",
            "swapped": f"{body} {swapped}",
            "other": f"{foreign} {_statement(_gold_and_others(donor)[0])}",
        }
        rationales = tuple(Rationale(kind, texts[kind], 0) for kind in KINDS)
        zoo.append(replace(problem, rationales=rationales))
    return zoo


def _gold_and_others(problem: Problem) -> tuple[Alternative, list[Alternative]]:
    """Returns the gold alternative and the others.

    Raises:
        ValueError: the gold answer is no alternative, or the only one.
    """
    found = problem.domain.alternatives(problem.answer, text_of(problem.prompt))
    gold = None if problem.answer is None else problem.domain.normalise(problem.answer)
    right = [option for option in found if option.name == gold]
    others = [option for option in found if option.name != gold]
    if len(right) != 1 or not others:
        raise ValueError(f"question_id {problem.question_id!r}: expected options, one of them gold")
    return right[0], others


def _reasons(problem: Problem) -> Iterator[str]:
    """Yields the text before the answer of each right rationale that has reasons."""
    try:
        _gold_and_others(problem)
    except ValueError:
        return
    domain = problem.domain
    for rationale in problem.rationales:
        text = rationale.completion
        if not isinstance(text, str) or not domain.matches(domain.extract(text), problem.answer):
            continue
        body = text[: find_marker(text)].strip()
        steps = split_steps(body) if body else []
        if sum(not domain.states(step.text) for step in steps) >= _FEWEST_REASONS:
            yield body


def _statement(option: Alternative) -> str:
    """Returns the sentence that states an option, with letter and text as far as it has both."""
    label = f"({option.name}) " if len(option.name) == 1 else ""
    return f"The answer is {label}{option.text.rstrip(' .')}."


def _restated(problem: Problem) -> str:
    """Returns the question of a prompt, without its options, as a rationale without reasons."""
    question = re.split(r"\n\s*\(?[Aa][).:]", text_of(problem.prompt), maxsplit=1)[0].strip()
    return (
        f"The question is about the following: {question.rstrip(' ?.')}. We have to think about "
        "this carefully. We look at the question and at what it asks for."
    )


def swap_options(problem: Problem, letter: str) -> Problem:
    """Returns the problem with the gold option in the place of option `letter`, and vice versa.

    The letters in the rationales change with the options. A score that depends on the content
    alone stays the same.

    Args:
        problem: a problem of multiple choice with options in its prompt, all in text form.
        letter: the letter of an option that is not gold.

    Raises:
        ValueError: the prompt is chat messages, or `letter` is none of its wrong options.
    """
    gold, others = _gold_and_others(problem)
    other = next((option for option in others if option.name == letter), None)
    if not isinstance(problem.prompt, str) or other is None or gold.text not in problem.prompt:
        raise ValueError(
            f"letter must name a wrong option in the prompt of question_id "
            f"{problem.question_id!r}, got {letter!r}"
        )
    texts = {gold.text: other.text, other.text: gold.text}
    labels = {gold.name: letter, letter: gold.name}
    lines = [_swap_line(line, texts) for line in problem.prompt.split("\n")]

    def relabelled(text: str) -> str:
        return re.sub(
            r"\(([A-J])\)|\b(?<=[Oo]ption )([A-J])\b",
            lambda m: m[0].replace(m[1] or m[2], labels.get(m[1] or m[2], m[1] or m[2])),
            text,
        )

    rationales = tuple(
        replace(r, completion=relabelled(r.completion)) if isinstance(r.completion, str) else r
        for r in problem.rationales
    )
    changed = replace(problem, prompt="\n".join(lines), answer=f"({letter})", rationales=rationales)
    return changed


def _swap_line(line: str, texts: dict[str, str]) -> str:
    found = re.fullmatch(r"(\W*[A-Ja-j][).:]\s*)(.*?)(\s*)", line)
    return f"{found[1]}{texts.get(found[2], found[2])}{found[3]}" if found else line


def worst_case(problem: Problem, score: Callable[[Problem], Sequence[float]]) -> list[float]:
    """Returns the lowest score of each rationale over all places of the gold option.

    It takes a pass for each option, so it is for a bench and not for training.

    Args:
        problem: a problem of multiple choice; one without options in its prompt is scored once.
        score: returns one score per rationale of a problem.
    """
    found = [list(score(problem))]
    _, others = _gold_and_others(problem)
    for option in others if len(others[0].name) == 1 else ():
        found.append(list(score(swap_options(problem, option.name))))
    return [min(scores) for scores in zip(*found, strict=True)]
