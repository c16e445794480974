"""What one forward pass is given (`Batch`) and leaves behind (`Pass`): all that a metric may see.

Indexing. A batch holds P problems, R rationales, M completion tokens, Q probe tokens and A answer
leaves. The tables are ordered: rationales by problem, tokens by rationale, leaves by rationale and
step, so that an offsets vector of size n + 1 is enough to slice any of them. A *row* is an index
into the hidden states flattened to [B * L, H]. The row that predicts a completion token is that of
the token before it, so the first tokens of the K rationales of a packed problem share one row: the
last of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compact.student import Student
    from compact_ops import TokenStats


@dataclass(frozen=True)
class EncodedRationale:
    """One rationale as token ids.

    Attributes:
        teacher: who wrote it.
        text: the completion as text.
        ids: [T] token ids, the end-of-turn token included.
        steps: (start, end) token spans of the reasoning steps, end exclusive, in order, at least
            one.
        step_texts: the text of each step, aligned with `steps`.
        spaced: for each step, whether the text up to its end asks for a space before the cue.
        marker: index into `ids` of the first token of the answer marker ("The answer is"), T if
            none.
        answer: the final answer as normalised text, or None where none was found.
    """

    teacher: str
    text: str
    ids: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]
    step_texts: tuple[str, ...]
    spaced: tuple[bool, ...]
    marker: int
    answer: str | None


@dataclass(frozen=True)
class EncodedProblem:
    """One problem as token ids: the atom of a batch.

    Attributes:
        question_id: as in the data file.
        prompt: the question as text.
        prompt_ids: [T] ids of the prompt, chat template applied.
        rationales: K >= 1 of them.
        gold: the gold answer as normalised text.
        gold_ids: [m] ids of the gold answer as it reads after the cue.
        cue_ids: ids of the answer cue that precedes the gold answer in an answer leaf.
        spaced_cue_ids: the same with a leading space, for steps that are `spaced`.
    """

    question_id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    rationales: tuple[EncodedRationale, ...]
    gold: str
    gold_ids: tuple[int, ...]
    cue_ids: tuple[int, ...]
    spaced_cue_ids: tuple[int, ...]


@dataclass
class Batch:
    """Tensors of one forward pass.

    The main block [B, L] holds prompts and rationales. The leaf block [B2, L2] holds the answer
    leaves: cue and gold answer, the last gold token left out since nothing is predicted from it.
    In a tree B2 = B and leaf row b attends to the main row b as well; padded, a leaf row repeats
    its whole prefix. The leaf block is None without probes.

    Attributes:
        layout: "tree" (a problem lies in one row, rationales are branches) or "padded" (a row a
            rationale).
        input_ids: [B, L] int64.
        position_ids: [B, L] int64; they restart at each branch point.
        attention_mask: [B, L] int64, 1 where there is a token. Who sees whom in a tree: `segments`.
        segments: tree only, [B, L] int64 node of the tree of each token; None when padded.
        visible: tree only, [B, S, S] bool, which node (query, key) sees which; None when padded. A
            token sees another when its node sees the other's and its position is not smaller.
        leaf_input_ids, leaf_position_ids, leaf_attention_mask: [B2, L2] int64, as above.
        leaf_segments: tree only, [B, L2] int64; nodes are numbered through main and leaf block.
        problems: P encoded problems.
        problem_offsets: [P + 1], rationales of problem p are those from problem_offsets[p] up to
            problem_offsets[p + 1].
        problem: [R] the problem of each rationale.
        token_offsets: [R + 1], completion tokens of rationale r.
        rows: [M] hidden row that predicts token m.
        target: [M] the token.
        rationale: [M] the rationale of token m.
        step: [M] the step that token m belongs to, -1 outside every step (the answer part).
        token_rows: [M] hidden row of token m itself (where the model has read it).
        prompt_rows: [P] or [R] (padded) hidden row of the last prompt token.
        gold_ids: [G] ids of all gold answers, gold_offsets: [P + 1].
        leaf_offsets: [R + 1], answer leaves of rationale r; the leaf after the bare question is
            `question_leaf`. Without probes there are no leaves (all offsets 0).
        leaf_step: [A] the step after which the leaf stands (its index; -1 for the bare question).
            The P leaves of the bare questions come last.
        question_leaf: [P] index of the leaf after the bare question, -1 if none.
        probe_rows, probe_target, probe_leaf: [Q] row in the leaf block's hidden states flattened to
            [B2 * L2, H], gold token and leaf of every probe token.
    """

    layout: Literal["tree", "padded"]
    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    segments: Tensor | None
    visible: Tensor | None
    leaf_input_ids: Tensor | None
    leaf_position_ids: Tensor | None
    leaf_attention_mask: Tensor | None
    leaf_segments: Tensor | None
    problems: tuple[EncodedProblem, ...]
    problem_offsets: Tensor
    problem: Tensor
    token_offsets: Tensor
    rows: Tensor
    target: Tensor
    rationale: Tensor
    step: Tensor
    token_rows: Tensor
    prompt_rows: Tensor
    gold_ids: Tensor
    gold_offsets: Tensor
    leaf_offsets: Tensor
    leaf_step: Tensor
    question_leaf: Tensor
    probe_rows: Tensor
    probe_target: Tensor
    probe_leaf: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with every tensor on `device`."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return Batch(**moved)

    @property
    def num_rationales(self) -> int:
        """R, the rationales in the batch."""
        return int(self.problem.numel())

    @property
    def teachers(self) -> list[str]:
        """[R] the teacher of each rationale."""
        return [r.teacher for p in self.problems for r in p.rationales]


@dataclass
class Pass:
    """What the one forward left behind, detached: all that a metric may read.

    Attributes:
        batch: what went in.
        student: body and head; a metric may read its weights but not run it.
        hidden: [B, L, H] final hidden states of the main block (what the LM head reads).
        leaf_hidden: [B2, L2, H] those of the leaf block; None without probes, and where every leaf
            was kept from an earlier step (probe_every > 1).
        stats: per completion token [M]: nll, lse, entropy, correct, gold_logit, gold_logp.
        leaf_logp: [A] mean log-likelihood (nats) of the gold answer's tokens at each answer leaf:
            I_i of docs/method.md. Empty without probes.
        cache: scratch that metrics share within the pass (step graphs, hidden at the marker).
    """

    batch: Batch
    student: Student
    hidden: Tensor
    leaf_hidden: Tensor | None
    stats: TokenStats
    leaf_logp: Tensor
    cache: dict[str, object] = field(default_factory=dict)
