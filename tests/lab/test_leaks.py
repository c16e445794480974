"""The leak zoo: its variants, and the metrics on it with a tiny student."""

from __future__ import annotations

import pytest
import torch

from compact.data import Problem, load_problems
from compact.lab.leaks import KINDS, leak_zoo, swap_options, worst_case
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.metrics import get_metric
from compact.passes.encode import encode_problem
from compact.passes.forward import observe
from compact.student import Student

_CHOICE = "{what}?\n(A) apples\n(B) books\n(C) coins"


def real() -> list[Problem]:
    """Questions with options, yes / no questions, and some that cannot be used."""
    rows = []
    for i, (what, fact, letter) in enumerate(
        (("Where do cows eat", "Cows eat grass. Grass needs soil", "B"),
         ("Where do birds fly", "Birds have wings. Wings need air", "C"),
         ("Where do whales swim", "Whales need water. Salt does no harm", "A"))
    ):  # fmt: skip
        rows.append(
            (f"c{i}", _CHOICE.format(what=what), f"{fact}. The answer is ({letter})", letter)
        )
    rows.append(
        ("y0", "Can cows fly?", "Cows are heavy. They have no wings. The answer is no", "no")
    )
    rows.append(("wrong", "Can a cow fly?", "Cows moo. They fly. The answer is yes", "no"))
    rows.append(("short", "Can a cow eat?", "Cows eat. The answer is yes", "yes"))
    rows.append(("open", "3 + 4?", "3 and 4. They make 7. The answer is 7", "7"))
    fields = ("question_id", "prompt", "completion", "answer")
    return load_problems([{"teacher": "t", **dict(zip(fields, row, strict=True))} for row in rows])


def test_variants() -> None:
    """Each usable question has each kind once, built as the module says."""
    zoo = {p.question_id: p for p in leak_zoo(real(), seed=0, limit=9)}
    assert sorted(zoo) == ["c0", "c1", "c2", "y0"]
    for problem in zoo.values():
        assert tuple(r.teacher for r in problem.rationales) == KINDS
        text = {r.teacher: str(r.completion) for r in problem.rationales}
        domain = problem.domain
        right = {k: domain.matches(domain.extract(t), problem.answer) for k, t in text.items()}
        assert all(right[k] for k in KINDS if k not in ("swapped", "other"))
        assert not right["swapped"]
        assert text["gold-leak"] == f"{text['leak-only']} {text['gold']}"
        assert text["wrong-facts"].endswith(text["leak-only"])
        assert text["gold"][: -len(text["leak-only"])] not in text["wrong-facts"]
    assert "The answer is (B) books." in str(zoo["c0"].rationales[3].completion)
    again = leak_zoo(real(), seed=0, limit=9)
    assert [p.rationales for p in again] == [p.rationales for p in zoo.values()]
    with pytest.raises(ValueError, match="two questions with options .* got 0"):
        leak_zoo(real()[-1:], seed=0, limit=2)


def test_the_metrics_on_the_zoo() -> None:
    """A leak alone is 0; one before the reasons leaves them as they are."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, seed=0, layers=1).eval(), tokenizer)
    zoo = leak_zoo(real(), seed=0, limit=4)
    encoded = [encode_problem(p, tokenizer, max_length=900, options=True) for p in zoo]
    pass_ = observe(student, encoded, options=True)
    sizes = [len(KINDS)] * len(zoo)
    adjusted = get_metric("leak-adjusted").score(pass_).split(sizes)
    agreement = get_metric("posterior-consensus").score(pass_).split(sizes)
    for problem, scores, agree in zip(zoo, adjusted, agreement, strict=True):
        of = dict(zip(KINDS, scores.tolist(), strict=True))
        assert of["leak-only"] == 0.0, problem.question_id
        assert of["gold"] == pytest.approx(of["swapped"], abs=1e-5)
        assert bool(((agree > 0) & (agree <= 1)).all())
    assert bool((torch.stack(adjusted)[:, KINDS.index("gold")] != 0).any())


def test_swapped_options() -> None:
    """Texts change places in the prompt, and letters in the rationales."""
    problem = real()[0]
    swapped = swap_options(problem, "C")
    assert swapped.prompt == "Where do cows eat?\n(A) apples\n(B) coins\n(C) books"
    assert swapped.answer == "(C)" and str(swapped.rationales[0].completion).endswith("is (C)")
    assert swap_options(swapped, "B").prompt == problem.prompt
    with pytest.raises(ValueError, match="letter must name a wrong option .* got 'B'"):
        swap_options(problem, "B")
    seen: list[str] = []

    def score(p: Problem) -> list[float]:
        seen.append(p.answer)
        return [float(len(seen) * (-1) ** len(seen))]

    assert worst_case(problem, score) == [-3.0] and seen == ["B", "(A)", "(C)"]
