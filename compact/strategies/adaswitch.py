"""AdaSwitch: the student writes until it leaves the teacher's path, then the teacher writes.

The student samples a text for the question. d_i is the divergence between the next-token
distributions of teacher and student at token i. At the first token with

    d_i > K x mean(d_{i-w}, ..., d_{i-1})

the teacher takes over and writes the rest. The loss is the mean over the tokens of the mixed text
of the same divergence; the likelihood of the text is not trained on.

Source: AdaSwitch (arXiv 2510.07842). Ours: K = 3 and w = 16; the first token, which has no window,
is compared with itself (K < 1 switches at once: off-policy; K = infinity never switches:
on-policy); the text is written first and the divergences are computed in one forward of each model,
which gives the same switch as comparing while writing.

Ours too: each teacher of the data may have its own white-box model. The one that takes over is that
of the rationale with the greatest weight, by the preset and the student as it is; of equal weights,
that of the likeliest rationale, so with `uniform` the likelihood decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from compact.means import Means
from compact.options import check_number
from compact.passes import EncodedProblem, Pass
from compact.passes.encode import plain_rationale
from compact.passes.forward import observe, token_states
from compact.passes.layout import choose_layout
from compact.passes.packing import Layout, build_batch
from compact.passes.segments import segment_mean
from compact.settings import MAX_LENGTH
from compact.strategies.base import LossTerm, Strategy, Term, register_strategy
from compact.strategies.white_box import WhiteBoxes, completion_states, divergence
from compact.student import evaluating
from compact.student.chat import answer_end
from compact.student.generation import generate_in_room, rooms, seed_of
from compact.validity import Judgement
from compact_ops.head_divergence import KINDS

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.data import Problem
    from compact.student import Student
    from compact.weighting import Weigher, Weights

MIXED = "student + teacher"
LEAST = 0.01
"""Smallest divergence at which the teacher takes over, in nats: below, it is rounding (ours)."""


def switch_point(divergences: Sequence[float], factor: float, window: int) -> int | None:
    """Returns the first token at which the teacher takes over; None if it never does.

    That is where the divergence is above `LEAST`, and above `factor` times the mean of the last
    `window` tokens.
    """
    for i, value in enumerate(divergences):
        before = divergences[max(i - window, 0) : i] or [value]
        if value > max(factor * sum(before) / len(before), LEAST):
            return i
    return None


@register_strategy("adaswitch")
class AdaSwitch(Strategy):
    """The student writes; where it diverges, a white-box teacher writes the rest; KL on both."""

    needs = ("rollouts", "white-box teacher")
    needs_whole_model: ClassVar[bool] = True
    nll_factor = 0.0

    def __init__(
        self,
        teachers: str | dict[str, str],
        factor: float = 3.0,
        window: int = 16,
        kind: str = "forward",
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        dtype: str = "bfloat16",
    ) -> None:
        """Sets up the switch.

        Args:
            teachers: the white-box teacher: a name, a folder or a .gguf file; or that of each
                teacher of the data, by name.
            factor: K; infinity never switches.
            window: w, in tokens.
            kind: the divergence, "forward", "reverse" or "jsd".
            max_new_tokens: most tokens of a text, student's and teacher's together.
            temperature: of student and teacher; 0 is greedy.
            dtype: of the teachers' weights.

        Raises:
            ValueError: a value is not allowed.
        """
        if kind not in KINDS:
            raise ValueError(f"kind of adaswitch must be one of {', '.join(KINDS)}, got {kind!r}")
        if factor != math.inf:
            check_number("factor of adaswitch", factor, least=0)
        check_number("window of adaswitch", window, least=1, whole=True)
        check_number("max_new_tokens of adaswitch", max_new_tokens, least=1, whole=True)
        check_number("temperature of adaswitch", temperature, least=0)
        self.white_boxes = WhiteBoxes("adaswitch", teachers, dtype)
        self.factor, self.window, self.kind = factor, window, kind
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.steps = self.seed = 0
        self.device: Any = "cpu"
        self.max_length = MAX_LENGTH
        self._layout: Layout | None = None  # that of the forward which chooses the teachers
        self._means = Means()

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Keeps the weigher; refuses a preset for one teacher, which leaves nothing to choose."""
        if args.preset != "uniform" and not self.white_boxes.several:
            raise ValueError(
                "preset must be uniform with strategy adaswitch and one white-box teacher, since "
                f"the preset chooses among several, got {args.preset!r}"
            )
        self.weigher = weigher
        self.seed, self.device, self.max_length = args.seed, args.device, args.max_length
        if weigher.needs.padded or args.layout == "padded":
            self._layout = "padded"

    def prepare(
        self, problems: Sequence[Problem], model: nn.Module, processing_class: Any
    ) -> Sequence[Problem]:
        """Loads the teachers.

        Raises:
            ValueError: a teacher of the data has no white-box model.
        """
        self.white_boxes.load(problems, processing_class, self.device)
        return problems

    def rollout(
        self, problems: Sequence[EncodedProblem], student: Student
    ) -> Sequence[EncodedProblem]:
        """Returns the problems with one mixed text each, in place of their rationales.

        With several teachers, its `teacher` is the one that took over, or would have.
        """
        prompts = [p.prompt_ids for p in problems]
        seeds = [seed_of(self.seed, self.steps, p.question_id) for p in problems]
        most = self.max_new_tokens
        with evaluating(student.model):
            names = self._chosen(problems, student)
            own = self._written(student, prompts, seeds, [most] * len(prompts))
            written = [
                _with_text(p, name, ids, student)
                for p, name, ids in zip(problems, names, own, strict=True)
            ]
            starts = self._switches(written, student)
        turned = [i for i, start in enumerate(starts) if start is not None]
        for name in dict.fromkeys(names[i] for i in turned):
            mine = [i for i in turned if names[i] == name]
            kept = [own[i][: starts[i]] for i in mine]
            left = [most - len(ids) for ids in kept]
            begun = [(*prompts[i], *ids) for i, ids in zip(mine, kept, strict=True)]
            model = self.white_boxes.of(name)
            assert model is not None  # `prepare` has loaded that of every teacher
            rest = self._written(model, begun, [seeds[i] + 1 for i in mine], left)
            for i, before, after in zip(mine, kept, rest, strict=True):
                written[i] = _with_text(problems[i], name, [*before, *after], student)
        self._means.add("switched", len(turned), len(problems))
        for i, problem in enumerate(written):
            length, start = len(problem.rationales[0].ids), starts[i]
            self._means.add(
                "share of tokens by the student", 1.0 if start is None else start / length
            )
            if self.white_boxes.several:
                for name in self.white_boxes.models:
                    self._means.add(f"questions/{name}", float(names[i] == name))
        return written

    def _chosen(self, problems: Sequence[EncodedProblem], student: Student) -> list[str]:
        """Returns the teacher of each problem."""
        if not self.white_boxes.several:
            return [MIXED] * len(problems)
        needs = self.weigher.needs
        if self._layout is None:
            # In mixed precision the trial of the layout would be rounded more than it allows. The
            # leaves of later problems are not known yet: they get as much room as a rationale.
            with torch.autocast(student.weight.device.type, enabled=False):
                most = self.max_length
                self._layout = choose_layout(student, "auto", most, leaf_room=most)[0]
        pass_ = observe(
            student,
            problems,
            layout=self._layout,
            leaves=needs.leaves,
            options=needs.options,
            statistics=needs.statistics,
        )
        weights = self.weigher(pass_).used.tolist()
        nll = segment_mean(pass_.stats.nll, pass_.batch.token_offsets).tolist()
        order = [(weight, -loss) for weight, loss in zip(weights, nll, strict=True)]
        names, r = [], 0
        for problem in problems:
            count = len(problem.rationales)
            best = max(range(count), key=lambda k: order[r + k])
            names.append(problem.rationales[best].teacher)
            r += count
        return names

    def _written(
        self,
        model: Student,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        most: Sequence[int],
    ) -> list[list[int]]:
        """Returns texts of at most `most` tokens, with the end token where one was written.

        Prompt and text have at most max_length tokens.
        """
        asked = zip(prompts, most, rooms(model.model, prompts, max(most)), strict=True)
        limits = [max(min(n, room, self.max_length - len(prompt)), 1) for prompt, n, room in asked]
        tokenizer = model.tokenizer
        texts = generate_in_room(
            model.model, tokenizer, prompts, max(limits), temperature=self.temperature, seeds=seeds
        )
        end = [token for token in [answer_end(tokenizer)] if token is not None]
        return [
            [*ids, *end] if len(ids) < limit else ids[:limit]
            for ids, limit in zip(texts, limits, strict=True)
        ]

    @torch.no_grad()
    def _switches(self, problems: Sequence[EncodedProblem], student: Student) -> list[int | None]:
        """Returns the token of each student's text at which the teacher takes over."""
        batch = build_batch(
            problems, layout="padded", leaves=False, pad_token_id=student.pad_token_id
        ).to(student.weight.device)
        found = self.divergences(token_states(student, batch), problems, student)
        parts = found.split(batch.token_offsets.diff().tolist())
        return [switch_point(part.tolist(), self.factor, self.window) for part in parts]

    def term(self, hidden: Tensor, pass_: Pass, weight: Tensor) -> Tensor:
        """Returns the mean divergence of each rationale from its teacher, weighted."""
        batch = pass_.batch
        own = completion_states(hidden, pass_)
        found = self.divergences(own, batch.problems, pass_.student)
        return (weight * segment_mean(found, batch.token_offsets)).sum()

    def divergences(
        self, own: Tensor, problems: Sequence[EncodedProblem], student: Student
    ) -> Tensor:
        """Returns [M] float32 divergences of the student from the teacher of each rationale.

        They are 0 where the teacher has no white-box model, as the weights are; see `knows`.

        Args:
            own: [M, H] hidden states that predict the completion tokens of the problems.
            problems: the problems.
            student: its head.
        """
        found = own.new_zeros(len(own), dtype=torch.float32)
        for model, mine, states in self.white_boxes.read(problems):
            rows = mine.to(own.device)
            found[rows] = divergence(own[rows], student, states, model, self.kind).float()
        return found

    def knows(self, teacher: str) -> bool:
        """Returns whether the teacher has a white-box model."""
        return self.white_boxes.knows(teacher)

    def loss_terms(self) -> Sequence[LossTerm]:
        """Returns the divergence on the mixed text."""
        return [Term("adaswitch", self.term)]

    def weigh(self, pass_: Pass, weights: Weights) -> Tensor:
        """Returns 1 for each mixed text: the preset has chosen the teacher already."""
        return torch.ones_like(weights.weight)

    def after_step(self, model: nn.Module, step: int, optimizer: Any) -> None:
        """Counts the steps, which seed the samples."""
        self.steps = step

    def take_log(self) -> dict[str, float]:
        """Returns how often the teacher took over and how much the student wrote."""
        return self._means.take()

    def state_dict(self) -> dict[str, Any]:
        """Returns the count of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.steps = int(state["steps"])


# An error that the student wrote does not leave the problem out: the teacher goes on from there.
_CHOSEN = Judgement(1.0, 1.0, "nothing", ())


def _with_text(
    problem: EncodedProblem, teacher: str, ids: Sequence[int], student: Student
) -> EncodedProblem:
    tokenizer = student.tokenizer
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    mixed = replace(plain_rationale(teacher, ids, text), judgement=_CHOSEN)
    return replace(problem, rationales=(mixed,))
