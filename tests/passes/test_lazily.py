"""Problems that are encoded when they are asked for, and judged by what a sample says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from compact.data import load_problems
from compact.lab import zoo
from compact.lab.zoo_student import build_tokenizer
from compact.passes import lazily
from compact.passes.encode import encode_problems
from compact.passes.lazily import LazyProblems
from compact.validity import Judge

TOKENIZER = build_tokenizer()
PROBLEMS = load_problems(zoo.make_rows(("good", "verbose"), 12, seed=0))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(lazily, "AT_ONCE", 4)
    yield 4


def test_small_data_are_encoded_and_judged_as_a_whole() -> None:
    wanted = encode_problems(PROBLEMS, TOKENIZER, max_length=512)
    found = LazyProblems(PROBLEMS, TOKENIZER, max_length=512)
    assert list(found) == found.sample == wanted


def test_a_problem_of_large_data_is_always_the_same(at_once: int) -> None:
    """Its judgement depends on the sample, not on what was asked for before."""
    found = LazyProblems(PROBLEMS, TOKENIZER, max_length=512)
    again = LazyProblems(PROBLEMS, TOKENIZER, max_length=512)
    assert len(found) == 12 and len(found.sample) == at_once
    ids = [p.question_id for p in PROBLEMS]
    places = [ids.index(p.question_id) for p in found.sample]
    # In order, but not at equal distances: two sources may take turns in a file.
    assert places == sorted(places) and len(set(np.diff(places))) > 1
    backwards = [again[i] for i in reversed(range(12))]
    assert list(found) == backwards[::-1] and found[-1] == found[11]
    assert all(r.judgement is not None for problem in found for r in problem.rationales)
    whole = encode_problems(PROBLEMS, TOKENIZER, max_length=512)
    assert [p.prompt_ids for p in found] == [p.prompt_ids for p in whole]
    with pytest.raises(IndexError):
        found[12]


def test_what_was_learned_from_judges_alike_one_by_one() -> None:
    cases = encode_problems(PROBLEMS, TOKENIZER, judged=False, max_length=512)
    judge = Judge(cases)
    assert [judge(case) for case in cases] == judge.judged


def test_a_prompt_that_is_too_long_is_refused_at_the_start(at_once: int) -> None:
    """Also in a row that is not in the sample. The message names its problem."""
    long = [*PROBLEMS[:10], replace(PROBLEMS[10], prompt="much " * 600)]
    with pytest.raises(ValueError, match=f"{PROBLEMS[10].question_id}.* leaves no room"):
        LazyProblems(long, TOKENIZER, max_length=512)
