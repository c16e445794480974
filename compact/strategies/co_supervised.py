"""Co-supervised learning: each question goes to the teacher that the student finds likeliest.

A run has rounds. Before a round, with the student as it is then:

1. every question is assigned to the teacher whose rationale has the least mean nll;
2. the keep rate is the share of questions whose assigned answer is among n answers that the
   student samples itself;
3. that share of the questions, those of least nll, is trained on in the round, each on its assigned
   rationale only.

Source: co-supervised learning (arXiv 2402.15505), for classifiers as weak supervisors. Ours: text;
the keep rate is estimated on `probe` questions and is at least `least`, so that a student that
never agrees still learns; the rounds divide the steps of one run.

A question that a round does not keep is replaced by one that it keeps, in turn. So a step trains on
as many questions as with other methods, and on each kept question about equally often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from compact.options import check_number
from compact.passes import EncodedProblem
from compact.passes.forward import observe
from compact.passes.lazily import LazyProblems
from compact.passes.segments import segment_mean
from compact.settings import MAX_LENGTH
from compact.strategies.base import Strategy, register_strategy
from compact.student import evaluating
from compact.student.generation import generate_in_room, seed_of

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.data import Problem
    from compact.student import Student
    from compact.weighting import Weigher

_CHUNK = 8  # problems of a forward


@register_strategy("co-supervised")
class CoSupervised(Strategy):
    """Each question learns from the likeliest teacher; rounds keep the questions of least loss."""

    needs = ("rollouts",)
    needs_whole_model: ClassVar[bool] = True

    def __init__(
        self,
        rounds: int = 3,
        samples: int = 4,
        probe: int = 64,
        least: float = 0.1,
        temperature: float = 0.8,
        max_new_tokens: int = 256,
    ) -> None:
        """Sets up the rounds.

        Args:
            rounds: rounds of the run.
            samples: n, answers that the student samples of a question.
            probe: questions on which the keep rate is estimated.
            least: least keep rate.
            temperature: of the samples; 0 for the likeliest one only.
            max_new_tokens: most tokens of a sample.

        Raises:
            ValueError: a value is not allowed.
        """
        for name, value in (
            ("rounds", rounds),
            ("samples", samples),
            ("probe", probe),
            ("max_new_tokens", max_new_tokens),
        ):
            check_number(f"{name} of co-supervised", value, least=1, whole=True)
        check_number("least of co-supervised", least, above=0, most=1)
        check_number("temperature of co-supervised", temperature, least=0)
        self.rounds, self.samples, self.probe, self.least = rounds, samples, probe, least
        self.temperature, self.max_new_tokens = temperature, max_new_tokens
        self.seed, self.max_length, self.total, self.steps = 0, MAX_LENGTH, 0, 0
        self.round = -1  # the round that `assigned` belongs to
        self.assigned: dict[str, str] = {}  # question_id -> teacher
        self.kept: set[str] = set()
        self._problems: Sequence[Problem] = ()
        self._encoded: Sequence[EncodedProblem] = ()
        self._log: dict[str, float] = {}
        self._place: dict[str, int] = {}  # question_id -> place in the data
        self._instead: dict[str, str] = {}  # question that is not kept -> the one read for it

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Refuses a preset: the strategy gives all weight to one teacher."""
        if args.preset != "uniform":
            raise ValueError(
                "preset must be uniform with strategy co-supervised, which gives all weight to one "
                f"teacher, got {args.preset!r}"
            )
        self.seed, self.max_length = args.seed, args.max_length

    def prepare(
        self, problems: Sequence[Problem], model: nn.Module, processing_class: Any
    ) -> Sequence[Problem]:
        """Keeps the problems, to assign them before each round."""
        self._problems = problems
        self._place = {problem.question_id: i for i, problem in enumerate(problems)}
        self._encoded = LazyProblems(
            problems, processing_class, judged=False, max_length=self.max_length
        )
        return problems

    def begin(self, model: nn.Module, total_steps: int) -> None:
        """Keeps the number of steps, which the rounds divide."""
        self.total = total_steps

    def rollout(
        self, problems: Sequence[EncodedProblem], student: Student
    ) -> Sequence[EncodedProblem]:
        """Assigns the questions at the start of a round; keeps its questions and rationales."""
        now = self.steps * self.rounds // max(self.total, 1)
        if now != self.round:
            self.round = now
            self._assign(student)
        return [self._read_for(problem) for problem in problems]

    def _read_for(self, problem: EncodedProblem) -> EncodedProblem:
        """Returns the question that is read for another, with its assigned rationale."""
        question = self._instead.get(problem.question_id)
        if question is not None:
            problem = self._encoded[self._place[question]]
        teacher = self.assigned[problem.question_id]
        return replace(
            problem, rationales=tuple(r for r in problem.rationales if r.teacher == teacher)
        )

    def _assign(self, student: Student) -> None:
        with evaluating(student.model):
            losses = self._likeliest(student)
            rate = max(self._keep_rate(student), self.least)
        order = sorted(losses, key=lambda q: (losses[q], q))
        self.kept = set(order[: max(round(rate * len(order)), 1)])
        self._replace()
        self._log = {"keep rate": rate}
        teachers = list(self.assigned.values())
        for teacher in sorted(set(teachers)):
            self._log[f"questions/{teacher}"] = teachers.count(teacher) / len(teachers)

    def _replace(self) -> None:
        """Says what is read for a question that the round does not keep."""
        rng = Random(f"{self.seed}/{self.round}")
        kept = sorted(self.kept)
        left_out = sorted(self.assigned.keys() - self.kept)
        rng.shuffle(kept)
        rng.shuffle(left_out)
        self._instead = dict(zip(left_out, cycle(kept), strict=False))

    def _likeliest(self, student: Student) -> dict[str, float]:
        """Assigns every question; returns question_id -> nll of the assigned rationale."""
        losses: dict[str, float] = {}
        for first in range(0, len(self._encoded), _CHUNK):
            part = self._encoded[first : first + _CHUNK]
            pass_ = observe(student, part, layout="padded", leaves=False)
            nll = segment_mean(pass_.stats.nll, pass_.batch.token_offsets)
            sizes = [len(p.rationales) for p in part]
            for problem, own in zip(part, nll.split(sizes), strict=True):
                best = int(own.argmin())
                self.assigned[problem.question_id] = problem.rationales[best].teacher
                losses[problem.question_id] = float(own[best])
        return losses

    @torch.no_grad()
    def _keep_rate(self, student: Student) -> float:
        """Returns the share of probed questions whose assigned answer the student samples too."""
        tokenizer = student.tokenizer
        rng = Random(f"{self.seed}/{self.steps}")
        probed = rng.sample(range(len(self._problems)), min(self.probe, len(self._problems)))
        agreed = 0
        for first in range(0, len(probed), _CHUNK):
            part = [(self._problems[i], self._encoded[i]) for i in probed[first : first + _CHUNK]]
            asked = [(encoded, i) for _, encoded in part for i in range(self.samples)]
            texts = generate_in_room(
                student.model,
                tokenizer,
                [encoded.prompt_ids for encoded, _ in asked],
                self.max_new_tokens,
                temperature=self.temperature,
                seeds=[seed_of(self.seed, self.steps, p.question_id, i) for p, i in asked],
            )
            for i, (problem, encoded) in enumerate(part):
                mine = next(
                    r for r in encoded.rationales if r.teacher == self.assigned[problem.question_id]
                )
                own = texts[i * self.samples : (i + 1) * self.samples]
                answers = [
                    problem.domain.extract(str(tokenizer.decode(t, skip_special_tokens=True)))
                    for t in own
                ]
                agreed += any(problem.domain.matches(a, mine.answer) for a in answers)
        return agreed / len(probed)

    def after_step(self, model: nn.Module, step: int, optimizer: Any) -> None:
        """Counts the steps, which the rounds divide."""
        self.steps = step

    def take_log(self) -> dict[str, float]:
        """Returns the keep rate and the share of each teacher, once a round."""
        found, self._log = self._log, {}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Returns the round and its assignment."""
        return {
            "steps": self.steps,
            "round": self.round,
            "assigned": self.assigned,
            "kept": sorted(self.kept),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.steps, self.round = int(state["steps"]), int(state["round"])
        self.assigned, self.kept = dict(state["assigned"]), set(state["kept"])
        self._replace()
