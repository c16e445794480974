"""The judgement of rationales: right answers first, then sound steps; reasons in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from compact.validity import judge
from compact.validity.judge import LEAST, UNREAD
from compact.validity.summary import describe

PROMPT = "A class has 4 boys and 14 girls. 2 leave. How many stay?"
GOOD = ("4 + 14 = 18", "18 - 2 = 16")
WRONG = ("4 + 14 = 20", "20 - 2 = 18")
FALSE = ("4 + 14 = 20", "18 - 2 = 16")  # a wrong step, the right answer


def case(*rationales: tuple[tuple[str, ...], str | None], gold: str | None = "16") -> Any:
    return SimpleNamespace(
        prompt=PROMPT,
        gold=gold,
        kind="number",
        rationales=[
            SimpleNamespace(teacher=f"t{k}", text=f"{k}. {steps}", step_texts=steps, answer=answer)
            for k, (steps, answer) in enumerate(rationales)
        ],
    )


def test_another_answer_than_the_gold_one_has_no_validity() -> None:
    (found,) = judge([case((GOOD, "16"), (WRONG, "18"), (GOOD, "16"))])
    assert [j.validity for j in found] == [1.0, 0.0, 1.0]
    assert {j.basis for j in found} == {"gold"}
    assert [f.text for f in found[1].findings][0] == "states 18, the gold answer is 16"
    assert found[0].findings == ()


def test_a_wrong_step_before_the_right_answer_costs_most_of_the_weight() -> None:
    problems = [case((GOOD, "16"), (FALSE, "16"), (GOOD, "16"), (GOOD, "16"))] + [
        case((GOOD, "16"), (GOOD, "16")) for _ in range(20)
    ]
    found = judge(problems)[0]
    assert found[1].validity < 0.1 < found[0].validity
    assert ("arithmetic", 0, "4 + 14 = 20 does not hold") in [
        (f.kind, f.step, f.text) for f in found[1].findings
    ]


@pytest.mark.parametrize("gold", ["16", None])
def test_a_problem_whose_right_answers_all_rest_on_wrong_arithmetic_is_left_out(
    gold: str | None,
) -> None:
    """The order of its rationales stays."""
    others = [case((GOOD, "16"), (GOOD, "16")) for _ in range(20)]
    found = judge([case((FALSE, "16"), (FALSE, "16"), (GOOD, "18"), gold=gold), *others])
    assert sum(j.validity for j in found[0]) < LEAST
    assert found[0][0].validity == found[0][1].validity > found[0][2].validity
    text = "\n".join(describe(found, weighed=True))
    assert "1 of 21 problems are skipped, because every rationale with the likeliest answer" in text
    (one,) = judge([case((FALSE, "16"), (FALSE, "16"), (GOOD, "16"), gold=gold), *others])[:1]
    assert one[2].validity > 0.9  # one that holds is enough


def test_a_number_of_two_right_texts_costs_nothing_among_many() -> None:
    """With 30 rationales, two are a small share of the weight."""
    steps = ("4 + 14 = 18", "18 - 2 = 16")
    others = [((f"so {'very ' * k}", *steps), "16") for k in range(28)]
    sharing = [((f"{word} 37 beads", *steps), "16") for word in ("with", "of")]
    (found,) = judge([case(*sharing, *others)])
    assert {j.validity for j in found} == {1.0} and not any(j.findings for j in found)


def test_one_failure_in_a_long_text_leaves_nothing_out() -> None:
    """With many equations and many failures in the data, one failure is what chance makes."""
    long = tuple(f"{n} + 1 = {n + 1}" for n in range(20)) + ("4 + 14 = 20", "18 - 2 = 16")
    others = [case((FALSE, "16"), (WRONG, "16")) for _ in range(20)]
    (found, *_) = judge([case((long, "16")), *others])
    assert found[0].validity == 1.0


def test_an_unread_answer_counts_less_than_the_gold_one_and_more_than_another() -> None:
    (found,) = judge([case((GOOD, "16"), (GOOD, None), (WRONG, "18"))])
    assert found[0].validity == 1.0
    assert found[1].validity == pytest.approx(UNREAD)
    assert found[2].validity == 0.0


def test_an_unread_answer_counts_nothing_beside_wrong_ones_alone() -> None:
    found = judge([case((WRONG, "18"), (GOOD, None)), case((GOOD, None), (WRONG, None))])
    assert [j.validity for j in found[0]] == [0.0, 0.0]
    assert [j.validity for j in found[1]] == [pytest.approx(UNREAD)] * 2  # nothing was read


def test_a_wrong_step_does_not_cost_the_right_answer_its_rank() -> None:
    many = [case((GOOD, "16"), (GOOD, "16")) for _ in range(20)]
    found = judge([case((GOOD, "16"), (FALSE, "16"), (GOOD, "16"), (("so",), None)), *many])[0]
    assert found[1].validity > found[3].validity == pytest.approx(UNREAD)


def test_copies_do_not_vouch_for_each_other() -> None:
    """Two copies of a text with invented numbers have the weight of one."""
    invented = ("4 + 14 = 18", "77 of 88 are 99", "18 - 2 = 16")
    others = [case((GOOD, "16"), (GOOD, "16")) for _ in range(20)]
    one = case((GOOD, "16"), (GOOD, "16"), (invented, "16"))
    two = case((GOOD, "16"), (GOOD, "16"), (invented, "16"), (invented, "16"))
    two.rationales[3].text = two.rationales[2].text
    (*_, alone), (*_, first, second) = (judge([problem, *others])[0] for problem in (one, two))
    assert alone.validity < 0.2
    assert first.validity + second.validity == pytest.approx(alone.validity, rel=1e-6)
    assert first.agreement == pytest.approx(alone.agreement, rel=0.05)


def test_a_number_without_others_to_compare_is_no_chance_to_fail() -> None:
    """Problems with one rationale do not lower the base rate of the check."""
    strange = ("77 of 88 are 99", "18 - 2 = 16")
    problem = case((GOOD, "16"), (strange, "16"), (GOOD, "16"))
    alone = judge([problem])[0][1].validity
    among = judge([problem, *(case((strange, "16")) for _ in range(200))])[0][1].validity
    assert among == pytest.approx(alone, rel=1e-6)


def test_without_gold_checks_order_one_answer_but_not_across_answers() -> None:
    problem = case((GOOD, "16"), (FALSE, "16"), (GOOD, "16"), (WRONG, "18"), gold=None)
    found = judge([problem])[0]
    right, false, _, wrong = (j.validity for j in found)
    assert right > false > wrong
    assert found[3].basis == "vote"
    assert found[3].findings[0].text == "states 18, the likeliest answer is 16"


def test_different_answers_are_no_vote() -> None:
    (found,) = judge([case((GOOD, "1"), (GOOD, "2"), gold=None)])
    assert {j.basis for j in found} == {"nothing"}
    assert found[0].validity == pytest.approx(found[1].validity)
    assert not any(f.kind == "vote" for j in found for f in j.findings)


def test_copies_share_the_weight_of_one() -> None:
    problem = case((GOOD, "16"), (GOOD, "16"), (GOOD, "16"))
    problem.rationales[1].text = problem.rationales[0].text
    (found,) = judge([problem])
    assert found[0].validity + found[1].validity == pytest.approx(found[2].validity)
    assert found[0].findings[0].text == "2 rationales have this text"


def test_rounding_breaks_no_tie_between_answers() -> None:
    """Whatever speaks against a lone text, its answer has as much of a vote as any other."""
    steps = [tuple(f"{n} + {n} = {2 * n + (m < n)}" for m in range(4)) for n in range(1, 5)]
    for size in range(2, 5):
        answers = [(steps[k], str(k)) for k in range(size)]
        (found,) = judge([case(*answers, gold=None)])
        assert len({j.validity for j in found}) == 1


@pytest.mark.parametrize("gold", ["16", None])
def test_the_order_of_rationales_and_problems_does_not_matter(gold: str | None) -> None:
    first = case((GOOD, "16"), (FALSE, "16"), (WRONG, "18"), (GOOD, None), gold=gold)
    second = case((WRONG, "18"), (GOOD, "16"), gold=gold)
    turned = case((GOOD, None), (WRONG, "18"), (FALSE, "16"), (GOOD, "16"), gold=gold)
    for old, new in zip(first.rationales, reversed(turned.rationales), strict=True):
        new.teacher, new.text = old.teacher, old.text
    before, after = judge([first, second])[0], judge([second, turned])[1]
    for old, new in zip(before, reversed(after), strict=True):
        assert old.validity == pytest.approx(new.validity)
        assert old.agreement == pytest.approx(new.agreement)
        assert old.findings == new.findings


def test_agreement_is_with_those_that_count() -> None:
    (found,) = judge([case((GOOD, "16"), (GOOD, "16"), (WRONG, "18"), (WRONG, "18"))])
    assert found[0].agreement > found[2].agreement
    (alone,) = judge([case((GOOD, "16"))])
    assert alone[0].agreement == 1.0


def test_a_short_text_agrees_as_much_as_a_long_one() -> None:
    """Where answers are numbers, words are not compared."""
    wordy = ("Ann has 4 red and 14 blue beads, 4 + 14 = 18 in all", "she takes out 2: 18 - 2 = 16")
    short = ("4 + 14 = 18", "18 - 2 = 16")
    terse, *long = judge([case((short, "16"), (wordy, "16"), (GOOD, "16"))])[0]
    assert terse.agreement == 1.0 == long[0].agreement
    alike, near, far = judge(
        [
            case((("a dog barks",), "yes"), (("a dog barks loud",), "yes"), (("no idea",), "yes")),
            case((("cats sleep",), "no"), (("fish swim",), "no")),
        ]
    )[0]
    assert alike.agreement > far.agreement < near.agreement


def test_one_rationale_and_none() -> None:
    assert judge([]) == []
    (found,) = judge([case((WRONG, None), gold=None)])
    assert found[0].basis == "nothing" and found[0].validity > 0


@pytest.mark.parametrize(("answers", "kept"), [((None, None), True), (("18", None), False)])
def test_without_a_right_answer_a_problem_is_kept_only_if_no_answer_was_read(
    answers: tuple[str | None, ...], kept: bool
) -> None:
    found = judge([case(*((GOOD, answer) for answer in answers))])
    assert (sum(j.validity for j in found[0]) >= LEAST) == kept
    assert len({j.validity for j in found[0]}) == 1
    assert "1 of 1 have no rationale that states the gold answer" in "\n".join(
        describe(found, weighed=True)
    )


def test_where_nothing_is_weighed_by_it_only_facts_are_told() -> None:
    problems = [case((GOOD, "16"), (WRONG, "18")), case((WRONG, "18"), (WRONG, "18"))]
    problems += [case((GOOD, "16")), case((FALSE, "16"), (FALSE, "16"))]
    problems += [case((GOOD, "16"), (GOOD, "16")) for _ in range(20)]
    found = judge([*problems, case((GOOD, "16"), (GOOD, "16"), gold=None)])
    weighed, told = (describe(found, weighed=flag) for flag in (True, False))
    assert any("have rationales that state it and others that do not: these" in w for w in weighed)
    facts = [line for line in told if "have rationales that state it" in line]
    assert [line.rpartition("that ")[2] for line in facts] == ["do not"]
    text = " ".join(told)
    assert not any(word in text for word in ("no weight", "skipped", "1 or 0", "judged by a vote"))


def test_a_problem_whose_weights_rest_on_nothing_is_not_called_skipped() -> None:
    others = [case((GOOD, "16"), (GOOD, "16")) for _ in range(20)]
    found = judge([case((FALSE, "16"), (FALSE, "16")), *others])
    sentence = "are skipped, because every rationale with the likeliest answer"
    assert sentence in "\n".join(describe(found, weighed=True))
    assert sentence not in "\n".join(describe(found, weighed=False))


def test_what_is_known_is_described() -> None:
    lines = describe(
        judge(
            [
                case((GOOD, "16"), (WRONG, "18")),
                case((WRONG, "18"), (WRONG, "18")),
                case((GOOD, "16"), (GOOD, "16"), gold=None),
                case((GOOD, "1"), (GOOD, "2"), gold=None),
                case((GOOD, "16")),
            ]
        ),
        weighed=True,
    )
    text = "\n".join(lines)
    assert "1 of 5 problems have one rationale, of weight 1 or 0" in text
    assert "1 of 2 problems with a gold answer have rationales that state it and others" in text
    assert "1 of 2 have no rationale that states the gold answer: they are skipped, unless" in text
    assert "unless no answer at all could be read" in text
    assert "1 of 2 of these have no two equal answers" in text
    assert "hold an equation that is wrong" in text


def test_teachers_that_only_state_the_same_answer_have_a_vote_each() -> None:
    """Their texts are equal without copying; they still share the weight of one text."""
    stated = (("The answer is yes.",), "yes")
    problem = case(stated, stated, stated, (GOOD, "no"), (WRONG, "no"), gold=None)
    for rationale in problem.rationales[:3]:
        rationale.text = "The answer is yes."
    (found,) = judge([problem])
    assert sum(j.validity for j in found[:3]) > sum(j.validity for j in found[3:])
    assert found[3].findings[0].text == "states no, the likeliest answer is yes"
    assert found[0].findings[-1].text == "3 rationales have this text"


def test_what_a_check_says_is_learned_for_each_kind_of_problem() -> None:
    """Years in answers of yes or no stay harmless among calculations without a strange number."""
    dated = ("He was born in 1961", "phones came in 1984")
    words = [case((dated, "yes"), (("he",), "yes"), gold="yes") for _ in range(30)]
    for problem in words:
        problem.kind = "yes_no"
    sums = [case((GOOD, "16"), (GOOD, "16")) for _ in range(300)]
    alone, among = (judge([*words, *more])[0][0].validity for more in ([], sums))
    assert alone > 0.5 and among > 0.75 * alone
