"""Option leaves: both layouts agree, gaps in a reading are not seen, the others do not change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compact.data import Problem, load_problems
from compact.lab.zoo_student import build_tokenizer
from compact.passes import EncodedProblem, Pass
from compact.passes.encode import encode_problem
from compact.passes.forward import observe
from compact.passes.packing import build_batch
from compact.passes.types import EncodedOptions
from compact.student import Student
from helpers.toy import CONFIGS, make_model, make_problem, with_options

READINGS = [((0, 1, 2),), ((0, 2), (0, 1, 2)), ((1, 2), (0, 1, 2)), ((), (0, 1, 2))]


def problems() -> list[EncodedProblem]:
    """One problem with every kind of reading, one open question, one without a gold option."""
    first = with_options(make_problem(1, [12, 14, 13, 11], steps=3), *READINGS)
    spaced = replace(first.rationales[1], spaced=(False, False, True))
    first = replace(first, rationales=(first.rationales[0], spaced, *first.rationales[2:]))
    open_question = replace(make_problem(2, [6]), options=EncodedOptions((), -1, None, (), ()))
    bare = with_options(make_problem(4, [12, 14], steps=3), *READINGS[:2], bare_prompt=True)
    last = with_options(make_problem(3, [9, 8], prompt=3), ((0,),), ((),), gold=-1)
    return [first, open_question, bare, last]


def by_hand(student: Student, problem: EncodedProblem, k: int, reading: tuple[int, ...]) -> list:
    """The mean log-likelihoods of the options after a plain text of prompt, steps and cue."""
    options, rationale = problem.options, problem.rationales[k]
    assert options is not None
    read: tuple[int, ...] = rationale.ids[: rationale.steps[0][0]] if reading else ()
    for i in reading:
        read += rationale.ids[slice(*rationale.steps[i])]
    cue = options.spaced_cue_ids if reading and rationale.spaced[reading[-1]] else options.cue_ids
    found = []
    for ids in options.ids:
        text = torch.tensor([(options.prompt_ids or problem.prompt_ids) + read + cue + ids])
        logp = student.model(input_ids=text).logits[0, :-1].log_softmax(-1)
        found.append(float(logp.gather(1, text[0, 1:, None])[-len(ids) :].mean()))
    return found


@pytest.mark.parametrize("layout", ["tree", "padded"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_each_place_is_a_plain_text(kind: str, layout: str) -> None:
    """Every option at every place has the likelihood it has in a text of its own."""
    student = Student.of(make_model(kind).eval())
    given = problems()
    pass_ = observe(student, given, layout=layout, options=True)
    leaves, logp = pass_.batch.options, pass_.option_logp
    assert leaves is not None and logp is not None
    of_place = logp.split(leaves.offsets.diff().tolist())
    r = 0
    with torch.no_grad():
        for p, problem in enumerate(given):
            want = by_hand(student, problem, 0, ()) if problem.options.ids else []
            torch.testing.assert_close(
                of_place[int(leaves.question[p])], torch.tensor(want), atol=1e-4, rtol=0
            )
            for k, rationale in enumerate(problem.rationales):
                readings = rationale.option_readings or ((),)
                for places, reading in (
                    (leaves.unstated, readings[0]),
                    (leaves.whole, readings[-1]),
                ):
                    place = int(places[r])
                    assert (place == int(leaves.question[p])) == (not reading)
                    want = by_hand(student, problem, k, reading) if problem.options.ids else []
                    torch.testing.assert_close(
                        of_place[place], torch.tensor(want), atol=1e-4, rtol=0
                    )
                r += 1
    assert leaves.gold.tolist() == [1, -1, 1, -1]
    assert leaves.offsets.diff().tolist()[-4:] == [3, 0, 3, 3]


@pytest.mark.parametrize("layout", ["tree", "padded"])
def test_they_change_nothing_else(layout: str) -> None:
    """Answer leaves and token statistics are those of a pass without option leaves."""
    student = Student.of(make_model("llama").eval())
    bare, asked = (observe(student, problems(), layout=layout, options=o) for o in (False, True))
    assert bare.option_logp is None and bare.batch.options is None
    torch.testing.assert_close(asked.leaf_logp, bare.leaf_logp, atol=1e-5, rtol=0)
    assert torch.equal(asked.stats.nll, bare.stats.nll)
    alone = observe(student, problems(), layout=layout, leaves=False, options=True)
    torch.testing.assert_close(alone.option_logp, asked.option_logp, atol=1e-5, rtol=0)
    assert alone.leaf_logp.numel() == 0


def test_several_problems_share_a_row() -> None:
    """The places follow the order of the problems, not that of the rows."""
    student = Student.of(make_model("llama").eval())

    def run(capacity: int) -> Pass:
        from compact.passes.forward import run_pass

        batch = build_batch(
            problems(), layout="tree", leaves=True, options=True, pad_token_id=0,
            row_capacity=capacity,
        )  # fmt: skip
        with torch.no_grad():
            return run_pass(student, batch)[2]

    one, many = run(400), run(0)
    assert len(one.batch.main.input_ids) == 1 and len(many.batch.main.input_ids) == 4
    torch.testing.assert_close(one.option_logp, many.option_logp, atol=1e-5, rtol=0)


def test_only_open_questions() -> None:
    """No question has options: one padding token, because ranks run the body equally often."""
    student = Student.of(make_model("llama").eval())
    for layout in ("tree", "padded"):
        pass_ = observe(student, problems()[1:2], layout=layout, leaves=False, options=True)
        assert pass_.batch.leaves is not None and pass_.batch.leaves.input_ids.tolist() == [[0]]
        assert pass_.option_logp is not None and pass_.option_logp.tolist() == []


def test_problems_must_be_encoded_with_options() -> None:
    """Otherwise their options are not known."""
    with pytest.raises(ValueError, match="encoded with options=True for option leaves, got .*'q1'"):
        build_batch(
            [make_problem(1, [5])], layout="tree", leaves=False, options=True, pad_token_id=0
        )


def choice(*completions: str) -> Problem:
    """A question with four options."""
    prompt = "Where do cows eat?\n(A) sea\n(B) the green field\n(C) 12 rooms\n(D) sky"
    rows = [
        {
            "question_id": "q",
            "prompt": prompt,
            "teacher": f"t{k}",
            "completion": text,
            "answer": "B",
        }
        for k, text in enumerate(completions)
    ]
    return load_problems(rows)[0]


def test_readings_leave_out_what_states_an_answer() -> None:
    """The letter, the text as a conclusion, and a cue; a mention alone stays."""
    problem = choice(
        "Cows eat grass. Grass grows on the green field. The answer is (B)",
        "The answer is (B). Cows eat grass. It grows in a field. The answer is (B)",
        "Cows eat grass. Therefore, B is right. It grows outside. The answer is (B)",
        "The answer is (B)",
    )
    found = encode_problem(
        problem, build_tokenizer(), max_length=400, options=True, leaf_budget=9.0
    )
    assert [r.option_readings for r in found.rationales] == [
        ((0, 1),),
        ((1, 2), (0, 1, 2)),
        ((0, 2), (0, 1, 2)),
        ((), (0,)),
    ]
    assert found.options is not None and found.options.gold == 1 and len(found.options.ids) == 4
    alone = replace(problem, prompt="Where do cows eat?")
    tokenizer = build_tokenizer()
    assert found.options.prompt_ids == encode_problem(alone, tokenizer, max_length=400).prompt_ids


def test_the_budget_keeps_the_question_and_the_reasons() -> None:
    """The place after all steps goes first; without options nothing is encoded."""
    problem = choice("The answer is (B). Cows eat grass. The answer is (B)", "The answer is (B)")
    found = encode_problem(
        problem, build_tokenizer(), max_length=400, options=True, leaf_budget=0.01
    )
    assert [r.option_readings for r in found.rationales] == [((1,),), ((),)]
    bare = encode_problem(problem, build_tokenizer(), max_length=400)
    assert bare.options is None and bare.rationales[0].option_readings == ()


def test_an_open_question_has_no_options() -> None:
    """A number is not chosen from a list."""
    problem = load_problems(
        [{"question_id": "q", "prompt": "3 + 4?", "teacher": "t", "completion": "3 + 4 = 7. The "
          "answer is 7", "answer": "7"}]
    )[0]  # fmt: skip
    found = encode_problem(problem, build_tokenizer(), max_length=400, options=True)
    assert found.options is not None and found.options.ids == () and found.options.gold == -1
