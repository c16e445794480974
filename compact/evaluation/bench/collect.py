"""Scores labelled rationales by every metric, preset and policy; a killed run resumes.

A row per question, in OUT/NAME.jsonl: for each rationale its label, every score, the scores of the
axes of every preset (their weights depend on all data, and are computed at the end), the weight of
every policy, and the scores of its labelled steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from compact.data import Problem
from compact.data.labelled import Label, Labels
from compact.evaluation.imported import imports_of
from compact.evaluation.score import passes_of
from compact.metrics import METRICS, VALIDITY, Metric
from compact.metrics.gain import step_gains
from compact.passes import EncodedProblem, EncodedRationale, Needs, Pass
from compact.passes.encode import encode_problems
from compact.passes.forward import observe
from compact.resumable import ResumableRows
from compact.student import Student
from compact.text.equations import equations
from compact.validity import Judgement, judge
from compact.weighting import POLICIES, PRESETS, PresetWeigher, Weigher, make_weigher
from compact.weighting.policies import StatefulPolicy

STEP_SCORES = ("equations", "surprise", "suspicion", "length", "gain")
"""How a wrong step is looked for: its equations that do not hold; its total nll; the first, and the
second where no equation of the rationale fails; its characters; the loss of gold likelihood."""
WITHOUT_GOLD = " without gold"
"""Suffix of a metric or preset that is scored as if the data had no gold answers."""


def collect(
    student: Student,
    processing_class: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    labels: Labels,
    rows: Path,
    settings: Mapping[str, Any],
    *,
    max_length: int,
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Scores the rationales; returns the rows, in the order of the problems.

    Args:
        student: the student.
        processing_class: its tokenizer.
        problems: labelled problems.
        labels: their labels.
        rows: the file of rows.
        settings: what the rows depend on besides what is measured; a file with other settings is
            refused.
        max_length: most tokens of the prompt and one rationale.
        only: names of metrics, presets and policies; () for all.
    """
    contest = _Contest.of(only)
    encoded = encode_problems(
        problems, processing_class, max_length=max_length, options=contest.needs.options
    )
    tails = contest.with_tails(problems, processing_class, max_length)
    blind = [replace(problem, gold=None, gold_ids=()) for problem in encoded]
    unseen = dict(zip((p.question_id for p in encoded), judge(blind), strict=True))
    with ResumableRows(rows, {**settings, **contest.named()}, key="question_id") as store:
        left = [p for p in encoded if p.question_id not in store.done]
        bar = tqdm(total=len(encoded), initial=len(encoded) - len(left), desc=rows.stem, unit="q")
        with bar:
            for chunk in passes_of(left):
                for row in contest.rows(student, chunk, tails, labels, unseen):
                    store.append(row)
                bar.update(len(chunk))
        store.complete({"questions": len(encoded)})
        return [store.done[p.question_id] for p in encoded]


class _Contest:
    """The metrics, presets and policies that are measured."""

    def __init__(
        self, metrics: Sequence[Metric], presets: Mapping[str, PresetWeigher], policies: Any
    ) -> None:
        self.metrics = metrics
        self.presets = presets
        self.policies: Mapping[str, Weigher] = policies
        weighers = (*presets.values(), *self.policies.values())
        self.needs = Needs.of_all(read.needs for read in (*metrics, *weighers))

    @classmethod
    def of(cls, only: Sequence[str]) -> _Contest:
        """Returns those with a name in `only`, all for ().

        Raises:
            ValueError: a name is unknown.
        """
        policies = [name for name, policy in POLICIES.items() if not _asks(name, policy)]
        known = (*METRICS, *PRESETS, *policies)
        for name in only:
            if name not in known:
                raise ValueError(f"--only must name some of {', '.join(known)}, got {name!r}")
        chosen = set(only or known)
        return cls(
            [m for name, m in METRICS.items() if name in chosen],
            {n: PresetWeigher(n, preset) for n, preset in PRESETS.items() if n in chosen},
            {name: make_weigher(name) for name in policies if name in chosen},
        )

    def named(self) -> dict[str, Any]:
        """Returns the part of the settings that says what is measured, and with which modules.

        Each metric, preset and policy is a key; `imports_of` tells the modules of --import.
        """
        kinds = {
            "metric": [metric.name for metric in self.metrics],
            "preset": self.presets,
            "policy": self.policies,
        }
        names = [name for of_kind in kinds.values() for name in of_kind]
        found = {f"{kind} {name}": True for kind, of_kind in kinds.items() for name in of_kind}
        return found | imports_of(names, (METRICS, PRESETS, POLICIES))

    def with_tails(
        self,
        problems: Sequence[Problem],
        processing_class: PreTrainedTokenizerBase,
        max_length: int,
    ) -> dict[str, EncodedProblem]:
        """Returns question_id -> the problem as the public code reads it; {} if nobody asks."""
        if not self.needs.padded:
            return {}
        encoded = encode_problems(
            problems, processing_class, judged=False, max_length=max_length, keep_tail=True
        )
        return {problem.question_id: problem for problem in encoded}

    def rows(
        self,
        student: Student,
        problems: Sequence[EncodedProblem],
        tails: Mapping[str, EncodedProblem],
        labels: Labels,
        unseen: Mapping[str, Sequence[Judgement]],
    ) -> list[dict[str, Any]]:
        """Returns a row per problem."""
        tree = observe(
            student,
            problems,
            layout="tree",
            options=self.needs.options,
            statistics=self.needs.statistics,
        )
        passes = {False: tree}
        if self.needs.padded:
            passes[True] = observe(
                student,
                [tails[problem.question_id] for problem in problems],
                layout="padded",
                leaves=False,
                statistics=self.needs.statistics,
            )
        scores: dict[str, Tensor] = {}
        for metric in self.metrics:
            values = metric.score(passes[metric.needs.padded]).float()
            scores[metric.name] = -values if metric.direction == "lower" else values
        axes = {
            name: {
                axis: values.tolist() for axis, values in w.score(passes[w.needs.padded]).items()
            }
            for name, w in self.presets.items()
        }
        weights = {name: w(tree).weight.tolist() for name, w in self.policies.items()}
        found = {name: values.tolist() for name, values in scores.items()}
        steps = _StepScores(tree)
        rows, r = [], 0
        for problem in problems:
            of_problem = []
            for k, rationale in enumerate(problem.rationales):
                label = labels[problem.question_id, rationale.teacher]
                blind = unseen[problem.question_id][k]
                of_problem.append(
                    {
                        "teacher": rationale.teacher,
                        "right": label.right,
                        "states_gold": label.states_gold,
                        "tokens": len(rationale.ids),
                        "scores": {name: values[r] for name, values in found.items()},
                        "axes": {n: {a: v[r] for a, v in ax.items()} for n, ax in axes.items()},
                        "blind": {VALIDITY: blind.validity, "agreement": blind.agreement},
                        "weights": {name: values[r] for name, values in weights.items()},
                        "steps": steps.of(r, rationale, label),
                    }
                )
                r += 1
            rows.append({"question_id": problem.question_id, "rationales": of_problem})
        return rows


def _asks(name: str, policy: Callable[..., Any]) -> bool:
    """Whether a policy needs a setting, or has a state to learn: it is then no contestant."""
    settings = inspect.signature(policy).parameters.values()
    if name == "oracle" or any(setting.default is setting.empty for setting in settings):
        return True
    return isinstance(policy(), StatefulPolicy)


class _StepScores:
    """Scores of the labelled steps of the rationales of a pass."""

    def __init__(self, pass_: Pass) -> None:
        self._offsets = pass_.batch.token_offsets.tolist()
        self._nll = pass_.stats.nll.detach().cpu().float()
        found = step_gains(pass_)
        self._gain, self._leaves = found.gain.tolist(), found.offsets.tolist()

    def of(self, r: int, rationale: EncodedRationale, label: Label) -> list[dict[str, Any]]:
        """Returns for each labelled step of rationale r its label and its `STEP_SCORES`.

        The steps of the label and ours may be cut differently: ours count for the labelled step
        in which they start.
        """
        if not label.steps:
            return []
        starts = _starts(rationale.text, [text for text, _ in label.steps])
        places = _starts(rationale.text, rationale.step_texts)
        nll = self._nll[self._offsets[r] : self._offsets[r + 1]]
        gains = dict(zip(rationale.asked_steps, self._gain[self._leaves[r] :], strict=False))
        rows: list[dict[str, Any]] = [
            {"right": right, **dict.fromkeys(STEP_SCORES, 0.0), "length": float(len(text))}
            for text, right in label.steps
        ]
        for i, (place, text) in enumerate(zip(places, rationale.step_texts, strict=True)):
            mine = rows[max(n for n, start in enumerate(starts) if start <= place or n == 0)]
            first, end = rationale.steps[i]
            mine["equations"] += sum(not e.holds for e in equations(text))
            mine["surprise"] += float(nll[first:end].sum())
            mine["gain"] -= gains.get(i, 0.0)
        failed = any(row["equations"] for row in rows)
        for row in rows:
            row["suspicion"] = row["equations"] if failed else row["surprise"]
        return rows


def _starts(text: str, parts: Sequence[str]) -> list[int]:
    """Returns where each part starts in the text, in order; a part that is not found goes on."""
    starts, place = [], 0
    for part in parts:
        found = text.find(part.strip()[:40], place)
        place = place if found < 0 else found
        starts.append(place)
        place += 1
    return starts


def weights_of_presets(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Returns name -> weights of all rationales, for every preset of the rows.

    A preset with a validity is also weighed as if the data had no gold answers: by the judgement
    without them, with an adaptability of 0.
    """
    flat = [rationale for row in rows for rationale in row["rationales"]]
    offsets = torch.tensor([0, *(len(row["rationales"]) for row in rows)]).cumsum(0)
    found = {}
    for name in flat[0]["axes"]:
        weigher = PresetWeigher(name, PRESETS[name])
        scores = {
            axis: torch.tensor([r["axes"][name][axis] for r in flat])
            for axis in weigher.all_metrics
        }
        found[name] = _weigh(weigher, scores, offsets)
        if weigher.preset.validity == "judged":
            blind = PresetWeigher(name, PRESETS[name])
            for axis, metric in blind.all_metrics.items():
                if metric.needs.judgements:
                    field = VALIDITY if axis == VALIDITY else "agreement"
                    scores[axis] = torch.tensor([r["blind"][field] for r in flat])
                elif metric.needs.gold:
                    scores[axis] = torch.zeros(len(flat))
            found[name + WITHOUT_GOLD] = _weigh(blind, scores, offsets)
    return found


def _weigh(weigher: PresetWeigher, scores: Mapping[str, Tensor], offsets: Tensor) -> list[float]:
    weigher.update(scores, offsets)
    weights: list[float] = weigher.weigh(scores, offsets).weight.tolist()
    return weights
