"""Feature contrast: states at the end of right reasonings, same gold answer together, others apart.

The feature of a rationale is the student's final hidden state f after its reasoning, at the token
that predicts the answer marker. It counts if the rationale's answer is the gold one. With labels y
(the gold answers of the micro-batch) and cosine similarity sim,

    L(f, g) = - mean_i mean_{j in P(i)} log( e_ij / sum_{a in A(i)} e_ia ),
    e_ij = exp(sim(f_i, g_j) / t)

P(i): entries with the label of i; A(i): all entries; for g = f without i itself. The term is
L(f, f) + L(f, g_teacher) with the white-box teacher's features g, plus `soft` times the forward KL
from the teacher to the student over the tokens of the rationales (soft targets).

Source: CKA, contrastive knowledge amalgamation (arXiv 2307.14781), whose name also means a measure
of similarity, hence this name. Ours: text, so a label is a gold answer and a feature is a hidden
state; teacher features of another width are projected by a fixed random orthonormal matrix, so no
parameters are trained besides the student's. Each teacher of the data may have its own white-box
model. The contrast is within a micro-batch, so its size matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from compact.means import Means
from compact.options import check_number
from compact.passes import EncodedProblem, Pass
from compact.passes.lazily import LazyProblems
from compact.passes.segments import segment_mean
from compact.settings import MAX_LENGTH
from compact.strategies.base import LossTerm, Strategy, Term, check_markers, register_strategy
from compact.strategies.white_box import WhiteBoxes, completion_states, divergence

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.data import Problem
    from compact.weighting import Weigher


def contrast(own: Tensor, other: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Returns L(own, other), a scalar; 0 if no entry has a partner.

    Args:
        own: [n, H] features with gradient.
        other: [n, H] features to compare with; `own` itself leaves out each entry's own column.
        labels: [n] int.
        temperature: t.
    """
    f, g = (nn.functional.normalize(x.float(), dim=1) for x in (own, other))
    same = labels[:, None] == labels
    allowed = torch.ones_like(same)
    if other is own:
        allowed.fill_diagonal_(False)
    z = (f @ g.T / temperature).masked_fill(~allowed, -torch.inf)
    log_p = z - z.logsumexp(1, keepdim=True)
    partners = same & allowed
    count = partners.sum(1)
    each = -torch.where(partners, log_p, 0.0).sum(1) / count.clamp(min=1)
    found = count > 0
    mean: Tensor = (each * found).sum() / found.sum().clamp(min=1)
    return mean


@lru_cache(maxsize=8)  # every micro-batch asks for it, and it takes a third of a second
def projection(width: int, to: int, seed: int) -> Tensor:
    """Returns a fixed [width, to] matrix with orthonormal columns, or rows if `to` is larger."""
    g = torch.Generator().manual_seed(seed)
    q: Tensor = torch.linalg.qr(torch.randn(max(width, to), min(width, to), generator=g))[0]
    return q if width >= to else q.T


@register_strategy("feature-contrast")
class FeatureContrast(Strategy):
    """Contrast of reasoning states by gold answer, within the student and with teachers (CKA)."""

    needs = ("gold", "white-box teacher")

    def __init__(
        self,
        teachers: str | dict[str, str],
        factor: float = 0.1,
        soft: float = 1.0,
        temperature: float = 0.1,
        dtype: str = "bfloat16",
        seed: int = 0,
    ) -> None:
        """Sets up the term.

        Args:
            teachers: the white-box model of each teacher of the data, by name; one text for all.
            factor: factor of the two contrasts.
            soft: factor of the soft targets; 0 leaves them out.
            temperature: t.
            dtype: of the teachers' weights.
            seed: of the projection.

        Raises:
            ValueError: a value is not allowed.
        """
        check_number("factor of feature-contrast", factor, least=0)
        check_number("soft of feature-contrast", soft, least=0)
        check_number("temperature of feature-contrast", temperature, above=0)
        check_number("seed of feature-contrast", seed, whole=True)
        self.white_boxes = WhiteBoxes("feature-contrast", teachers, dtype)
        self.factor, self.soft, self.temperature, self.seed = factor, soft, temperature, seed
        self.device: Any = "cpu"
        self.max_length = MAX_LENGTH
        self._means = Means()

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Refuses micro-batches of one problem, in which there is nothing to contrast."""
        if self.factor and args.per_device_train_batch_size < 2:
            raise ValueError(
                "per_device_train_batch_size must be at least 2 with strategy feature-contrast, "
                f"which contrasts the problems of a micro-batch, got "
                f"{args.per_device_train_batch_size}"
            )
        self.device, self.max_length = args.device, args.max_length

    def prepare(
        self, problems: Sequence[Problem], model: nn.Module, processing_class: Any
    ) -> Sequence[Problem]:
        """Loads the white-box models, each once.

        Raises:
            ValueError: a teacher of the data has no white-box model, or there is nothing to
                contrast.
        """
        if self.factor:
            encoded = LazyProblems(
                problems, processing_class, judged=False, max_length=self.max_length
            )
            then = "they are not contrasted (factor 0: soft targets alone)"
            check_markers("feature-contrast", encoded, then, only_right=True)
        self.white_boxes.load(problems, processing_class, self.device)
        return problems

    def labels(self, problems: Sequence[EncodedProblem]) -> list[int]:
        """Returns a number for each problem, equal for those with the same gold answer.

        (B) of one question is not (B) of another: a choice has its question's own number.
        """
        answers = [
            (p.gold, p.question_id if p.domain.alternatives(p.gold, p.prompt) else "")
            for p in problems
        ]
        numbers = {answer: i for i, answer in enumerate(dict.fromkeys(answers))}
        return [numbers[answer] for answer in answers]

    def term(self, hidden: Tensor, pass_: Pass, weight: Tensor) -> Tensor:
        """Returns the contrasts and the soft targets of a pass."""
        batch = pass_.batch
        means = self._means if hidden.requires_grad else Means()  # evaluation is not logged
        own = completion_states(hidden, pass_)
        places = _ends_of_reasoning(pass_, weight)
        features = own.new_zeros((len(places), own.shape[1]), dtype=torch.float32)
        found = own.new_zeros(len(own), dtype=torch.float32)
        answers = self.labels(batch.problems)
        labels = torch.tensor([answers[p] for _, p, _ in places], device=own.device)
        tokens = torch.tensor([t for _, _, t in places], device=own.device, dtype=torch.int64)
        for model, read, states in self.white_boxes.read(batch.problems):
            mine = read.to(own.device)
            if self.soft:
                found[mine] = divergence(own[mine], pass_.student, states, model).float()
            matrix = projection(states.shape[1], own.shape[1], self.seed).to(own.device)
            here = mine[tokens]
            rows = mine.cumsum(0)[tokens[here]] - 1  # of the tokens among those that it has read
            features[here] = states[rows].float() @ matrix
        total = self.soft * (segment_mean(found, batch.token_offsets) * weight).sum()
        if self.factor and len(places) > 1:
            mine_now = own[tokens]
            inner = contrast(mine_now, mine_now, labels, self.temperature)
            outer = contrast(mine_now, features, labels, self.temperature)
            means.add("contrast/student", float(inner.detach()))
            means.add("contrast/teachers", float(outer.detach()))
            problems = len({p for _, p, _ in places})  # the trainer divides by the problems
            total = total + self.factor * problems * (inner + outer)
        return total

    def knows(self, teacher: str) -> bool:
        """Returns whether the teacher has a white-box model."""
        return self.white_boxes.knows(teacher)

    def loss_terms(self) -> Sequence[LossTerm]:
        """Returns the term."""
        return [Term("feature-contrast", self.term)]

    def take_log(self) -> dict[str, float]:
        """Returns the mean of each contrast."""
        return self._means.take()


def _ends_of_reasoning(pass_: Pass, weight: Tensor) -> list[tuple[int, int, int]]:
    """Returns (rationale, problem, token) of the right rationales that count and have a marker.

    `token` is the index of the answer marker's first token among all completion tokens.
    """
    offsets, problem = pass_.batch.token_offsets.tolist(), pass_.batch.problem.tolist()
    counted = weight.tolist()
    places, r = [], 0
    for own in pass_.batch.problems:
        for rationale, right in zip(own.rationales, own.right, strict=True):
            if right and rationale.marker < len(rationale.ids) and counted[r] > 0:
                places.append((r, problem[r], offsets[r] + rationale.marker))
            r += 1
    return places
