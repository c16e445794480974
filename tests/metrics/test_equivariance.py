"""Every metric and every way to weigh, on random problems: the order of the teachers is nothing."""

from __future__ import annotations

import json
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from compact.metrics import get_metric, metric_names
from compact.passes import EncodedProblem, EncodedRationale, Pass
from compact.passes.forward import run_pass
from compact.passes.packing import build_batch
from compact.passes.types import EncodedOptions
from compact.student import Student
from compact.weighting import PRESETS, make_weigher
from compact.weighting.policies import POLICIES
from compact.weighting.weighers import PresetWeigher
from compact_ops import STATISTICS
from helpers.toy import VOCABULARY, ThinkingWords, make_model

_STUDENT = replace(
    Student.of(make_model("llama").eval()), processing_class=ThinkingWords(3, 11, 40)
)
# pcgrad projects in the order of the teachers, as published, so its weights depend on it.
_WEIGHERS = (
    *PRESETS,
    *(p if p != "single" else "single:t0" for p in POLICIES if p != "pcgrad"),
)
_SETTINGS = {"oracle": {"teachers": ["t0", "t2"]}, "mind": {"every": 1}}
# A nll of 5 is right to 4e-7; `released` and `paper` divide by std + 1e-4, 0 + 1e-4 among copies.
_ROUNDING = 1e-2
# Sums that hold and sums that fail, bare numbers, words, and steps that say the same: many ties.
_TEXTS = ("3 + 4 = 7", "4 + 3 = 7", "3 + 4 = 8", "7 apples", "now 7 and 8", "hence", "so it is")


@pytest.fixture(scope="module", autouse=True)
def confidences(tmp_path_factory) -> None:
    """Writes how sure each teacher is, for `muki`."""
    path = tmp_path_factory.mktemp("muki") / "confidences.jsonl"
    rows = [{"question_id": "q", "teacher": f"t{k}", "confidence": 1 / (1 + k)} for k in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _SETTINGS["muki"] = {"confidences": str(path)}


def _tokens(text: str) -> tuple[int, ...]:
    """A step's tokens: the same text reads the same everywhere."""
    return tuple(1 + (31 * i + 7 * ord(letter)) % (VOCABULARY - 1) for i, letter in enumerate(text))


def _rationale(texts: list[str], answer: str | None) -> EncodedRationale:
    """Encodes steps of those texts, followed by the answer."""
    ids: tuple[int, ...] = ()
    spans = []
    for text in texts:
        spans.append((len(ids), len(ids) + len(_tokens(text))))
        ids += _tokens(text)
    return EncodedRationale(
        teacher="",
        text="\n".join(texts),
        ids=ids + _tokens(answer or "?"),
        steps=tuple(spans),
        step_texts=tuple(texts),
        spaced=(False,) * len(texts),
        marker=len(ids),
        answer=answer,
        option_readings=(tuple(i for i, t in enumerate(texts) if "7" in t),),
    )


_RATIONALES = st.builds(
    _rationale,
    st.lists(st.sampled_from(_TEXTS), min_size=1, max_size=4),
    st.sampled_from(("7", "8", None)),
)


def _problem(rationales: list[EncodedRationale]) -> EncodedProblem:
    """A problem whose teachers are named by place."""
    return EncodedProblem(
        question_id="q",
        prompt="Mia has 3 apples and gets 4 more.",
        prompt_ids=_tokens("Mia has 3"),
        rationales=tuple(replace(r, teacher=f"t{k}") for k, r in enumerate(rationales)),
        gold="7",
        gold_ids=_tokens("7"),
        cue_ids=_tokens("is"),
        spaced_cue_ids=_tokens("is"),
        raw_gold_ids=_tokens("7"),
        options=EncodedOptions((_tokens("7"), _tokens("8")), 0, None, _tokens("is"), _tokens("is")),
    )


def _passes(problems: list[EncodedProblem]) -> dict[bool, Pass]:
    """A tree and a padded pass (key: padded), both with answer leaves and option leaves."""
    passes = {}
    for padded in (False, True):
        layout = "padded" if padded else "tree"
        batch = build_batch(problems, layout=layout, leaves=True, options=True, pad_token_id=0)
        with torch.no_grad():
            passes[padded] = run_pass(_STUDENT, batch, statistics=STATISTICS)[2]
    return passes


def _everything(problems: list[EncodedProblem]) -> dict[str, torch.Tensor]:
    """Name -> [R] the scores of every metric and the weights of every preset and policy."""
    passes = _passes(problems)
    found = {}
    for name in metric_names():
        metric = get_metric(name)
        found[f"metric {name}"] = metric.score(passes[metric.needs.padded]).detach().float()
    for name in _WEIGHERS:
        found[f"weight {name}"] = experienced_weights(name, passes)
    return found


def experienced_weights(name: str, passes: dict[bool, Pass]) -> torch.Tensor:
    """The weights [R] of a weigher that has seen scores.

    A preset has seen some with the axes in agreement: a new `robust` weighs evenly. A policy with
    state has seen those of the pass.
    """
    weigher = make_weigher(name, **_SETTINGS.get(name, {}))
    pass_ = passes[weigher.needs.padded]
    if isinstance(weigher, PresetWeigher):
        scores = torch.tensor([0.0, 1.0, 2.0, 4.0]).repeat(20)
        weigher.update(dict.fromkeys(weigher.metrics, scores), torch.arange(0, 81, 4))
    else:
        weigher.update(weigher(pass_).scores, pass_.batch.problem_offsets)
    return weigher(pass_).weight


@settings(max_examples=40)
@given(st.lists(_RATIONALES, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_permuting_teachers_permutes_scores_and_weights(rationales, rng) -> None:
    """Scores and weights go with the rationale, not with its place among the others."""
    problem = _problem(rationales)
    order = list(range(len(rationales)))
    rng.shuffle(order)
    shuffled = replace(problem, rationales=tuple(problem.rationales[i] for i in order))
    before, after = _everything([problem]), _everything([shuffled])
    for name, values in before.items():
        torch.testing.assert_close(
            after[name], values[order], rtol=0, atol=_ROUNDING, msg=lambda m, n=name: f"{n}: {m}"
        )


@settings(max_examples=25)
@given(st.lists(_RATIONALES, min_size=1, max_size=3), st.integers(0, 2), st.integers(1, 3))
def test_identical_rationales_score_and_weigh_the_same(rationales, which, copies) -> None:
    """Copies of a rationale among others, or alone, get what it gets."""
    which %= len(rationales)
    found = _everything([_problem([*rationales, *[rationales[which]] * copies])])
    by_teacher = ("weight single:t0", "weight oracle", "weight mind", "weight muki")
    for name in (*by_teacher, "metric random"):  # these go by who wrote it
        del found[name]
    for name, values in found.items():
        copied = values[[which, *range(len(rationales), len(values))]]
        assert float(copied.max() - copied.min()) < _ROUNDING, (name, values)


@settings(max_examples=25)
@given(st.lists(st.lists(_RATIONALES, min_size=1, max_size=4), min_size=1, max_size=3))
def test_weights_are_a_share_of_each_problem(rationales) -> None:
    """They are >= 0 and sum to 1 over each problem of a pass, so a teacher alone has 1."""
    problems = [_problem(some) for some in rationales]
    passes = _passes(problems)
    for name in _WEIGHERS:
        weight = experienced_weights(name, passes)
        assert bool((weight >= 0).all()), name
        for problem, mine in zip(
            problems, weight.split([len(some) for some in rationales]), strict=True
        ):
            left_out = name == "rejection" and all(r.answer != "7" for r in problem.rationales)
            assert float(mine.sum()) == pytest.approx(0.0 if left_out else 1.0, abs=1e-5), name


@pytest.mark.parametrize("axis", ["adaptability", "consensus", "difficulty"])
def test_every_metric_can_stand_in_a_preset(axis: str) -> None:
    """Named as an override it gives weights that sum to 1; a pooled one is refused."""
    for name in metric_names(axis):
        if get_metric(name).pooled:
            with pytest.raises(ValueError, match=f"{axis} must not be {name} in a preset"):
                make_weigher("robust", **{axis: name})
            continue
        weigher = make_weigher("robust", **{axis: name})
        passes = _passes([_problem([_rationale(["3 + 4 = 7"], "7"), _rationale(["hence"], "8")])])
        weight = weigher(passes[weigher.needs.padded]).weight
        assert float(weight.sum()) == pytest.approx(1.0, abs=1e-5), name
