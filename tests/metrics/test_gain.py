"""`gain`: levels, gains and epiphanies of steps against a plain transcription."""

from __future__ import annotations

import statistics
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from compact.metrics import get_metric
from compact.metrics.gain import UNDERSTOOD, step_gains
from compact.passes import EncodedProblem, Pass
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.student import Student
from helpers.toy import make_model, make_problem

_STUDENT = Student.of(make_model("llama").eval())


def a_pass(problems: list[EncodedProblem]) -> Pass:
    """A pass with answer leaves."""
    batch = build_batch(problems, layout="tree", leaves=True, pad_token_id=0)
    with torch.no_grad():
        return run_pass(_STUDENT, batch)[2]


def of_levels(problems: list[tuple[float, list[list[float]]]]) -> Pass:
    """A pass whose leaves stand at given levels: I_0, then I_1 .. I_n of every rationale."""
    encoded = [
        make_problem(seed, [2 + 2 * max(map(len, rationales))] * len(rationales))
        for seed, (_, rationales) in enumerate(problems)
    ]
    for p, (_, rationales) in enumerate(problems):
        cut = [
            replace(
                r,
                steps=tuple((i, i + 1) for i in range(len(mine))),
                step_texts=("",) * len(mine),
                spaced=(False,) * len(mine),
            )
            for r, mine in zip(encoded[p].rationales, rationales, strict=True)
        ]
        encoded[p] = replace(encoded[p], rationales=tuple(cut))
    found = a_pass(encoded)
    steps = [level for _, rationales in problems for mine in rationales for level in mine]
    found.leaf_logp = torch.tensor([*steps, *(start for start, _ in problems)])
    return found


def plain(start: float, rationales: list[list[float]]) -> list[tuple[list[bool], float]]:
    """Epiphanies and A_k of every rationale, word for word as compact/metrics/gain.py has it."""
    gains = [
        [level - before for level, before in zip(mine, [start, *mine[:-1]], strict=True)]
        for mine in rationales
    ]
    every = [gain for mine in gains for gain in mine]
    middle = statistics.median(every)
    spread = statistics.median(abs(gain - middle) for gain in every)
    limit = max(0.1, middle + 3 * spread)
    found = []
    for mine, gained in zip(rationales, gains, strict=True):
        epiphany = [gain > limit for gain in gained]
        capped = [min(level, UNDERSTOOD) - min(start, UNDERSTOOD) for level in mine]
        kept = [0.0, *(max(0.0, min(capped[i:])) for i in range(len(mine)))]
        jumps = sum(kept[i + 1] - kept[i] for i, jump in enumerate(epiphany) if jump)
        found.append((epiphany, 0.5 * capped[-1] + 0.5 * jumps))
    return found


# Eighths are exact in float32, so that no rounding decides what is an epiphany.
_LEVEL = st.integers(-64, 0).map(lambda eighths: eighths / 8)
_PROBLEM = st.tuples(
    _LEVEL, st.lists(st.lists(_LEVEL, min_size=1, max_size=6), min_size=1, max_size=4)
)


@settings(max_examples=60)
@given(st.lists(_PROBLEM, min_size=1, max_size=3))
def test_gain_equals_its_transcription(problems) -> None:
    """Epiphanies are judged within the problem, A_k within the rationale."""
    found = of_levels(problems)
    gains, score = step_gains(found), get_metric("gain").score(found)
    wanted = [one for problem in problems for one in plain(*problem)]
    assert gains.epiphany.tolist() == [e for epiphany, _ in wanted for e in epiphany]
    torch.testing.assert_close(score, torch.tensor([a for _, a in wanted]), rtol=0, atol=1e-5)
    starts = [start for start, rationales in problems for _ in rationales]
    assert gains.start.tolist() == starts
    for r, (first, end) in enumerate(zip(gains.offsets[:-1], gains.offsets[1:], strict=True)):
        risen = float(gains.level[end - 1]) - starts[r]
        assert float(gains.gain[first:end].sum()) == pytest.approx(risen, abs=1e-5)


def test_an_epiphany_by_hand() -> None:
    """One step tells the answer, the others tell nothing."""
    found = of_levels([(-4.0, [[-4.0, -2.0, -2.0], [-4.0, -4.0, -4.0]])])
    assert step_gains(found).epiphany.tolist() == [False, True, False, False, False, False]
    assert get_metric("gain").score(found).tolist() == pytest.approx([2.0, 0.0])


def test_what_is_lost_again_is_no_insight() -> None:
    """A jump that does not last to the end counts for nothing, however often it comes."""
    steady, restless = [-4.0, -3.0, -2.0], [-2.0, -4.0, -2.0]
    score = get_metric("gain").score(of_levels([(-4.0, [steady, restless, [-4.0, -4.0, -4.0]])]))
    assert float(score[1]) <= float(score[0]) + 1e-6
    assert float(score[2]) == 0.0


def test_levels_are_the_likelihood_of_the_gold_answer() -> None:
    """I_i is what the student itself says after question, steps, cue; I_0 after the question."""
    problem = make_problem(3, [8, 11], steps=3)
    found = a_pass([problem])
    gains = step_gains(found)

    def level(prefix: tuple[int, ...]) -> float:
        ids = torch.tensor([[*prefix, *problem.cue_ids, *problem.gold_ids]])
        with torch.no_grad():
            logp = _STUDENT.model(input_ids=ids).logits[0].log_softmax(-1)
        count = len(problem.gold_ids)
        return float(logp[-count - 1 : -1].gather(1, ids[0, -count:, None]).mean())

    wanted = [
        level(problem.prompt_ids + r.ids[:end]) for r in problem.rationales for _, end in r.steps
    ]
    torch.testing.assert_close(gains.level, torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    assert float(gains.start[0]) == pytest.approx(level(problem.prompt_ids), abs=1e-4)
