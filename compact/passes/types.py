"""What one forward pass is given (`Batch`) and leaves behind (`Pass`): all that a metric may see.

Indexing. A batch holds P problems, R rationales, M completion tokens, A answer leaves and Q gold
tokens in them. The tables are ordered: rationales by problem, tokens by rationale, leaves by
rationale and step, so that an offsets vector of size n + 1 is enough to slice any of them. A *row*
is an index into the hidden states flattened to [B * L, H]. The row that predicts a completion token
is that of the token before it, so the first tokens of the K rationales of a packed problem share
one row: the last of the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

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
        answer: the final answer in the normal form of the problem's answer domain, or None where
            none was found. Within a problem, answers that match have one text: the gold answer's
            where they match it.
        leaf_steps: indices of the steps after which an answer leaf stands, in order; None for all.
    """

    teacher: str
    text: str
    ids: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]
    step_texts: tuple[str, ...]
    spaced: tuple[bool, ...]
    marker: int
    answer: str | None
    leaf_steps: tuple[int, ...] | None = None

    @property
    def asked_steps(self) -> tuple[int, ...]:
        """Indices of the steps after which the gold answer is asked for, the last one included."""
        return tuple(range(len(self.steps))) if self.leaf_steps is None else self.leaf_steps


@dataclass(frozen=True)
class EncodedProblem:
    """One problem as token ids: the atom of a batch.

    Attributes:
        question_id: as in the data file.
        prompt: the question as text.
        prompt_ids: [T] ids of the prompt, chat template applied.
        rationales: K >= 1 of them.
        gold: the gold answer in normal form; a rationale whose `answer` is this text is right.
        gold_ids: [m] ids of the gold answer, as the data write it, after the cue.
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


@dataclass(frozen=True)
class Block:
    """Rows of tokens.

    Attributes:
        input_ids: [B, L] int64.
        position_ids: [B, L] int64; in a tree they restart at each branch point.
        attention_mask: [B, L] int64, 1 where there is a token. Who sees whom in a tree: `segments`.
        segments: tree only, [B, L] int64 node of the tree of each token, numbered through main and
            leaf block; None when padded.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    segments: Tensor | None

    def to(self, device: torch.device | str) -> Block:
        """Returns the block with every tensor on `device`."""
        return Block(**_moved(self, device))


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass.

    The main block [B, L] holds prompts and rationales. The leaf block [B2, L2] holds the answer
    leaves: cue and gold answer, the last gold token left out since nothing is predicted from it.
    In a tree B2 = B and leaf row b attends to the main row b as well; padded, a leaf row repeats
    its whole prefix.

    Attributes:
        layout: "tree" (a problem lies in one row, rationales are branches) or "padded" (a row a
            rationale).
        main: the main block.
        leaves: the leaf block; None without leaves.
        visible: tree only, [B, S, S] bool, which node (query, key) sees which; None when padded. A
            token sees another when its node sees the other's and its position is not smaller.
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
            `question_leaf`. All offsets are 0 without leaves.
        leaf_step: [A] the step after which the leaf stands (its index; -1 for the bare question).
            The P leaves of the bare questions come last.
        question_leaf: [P] index of the leaf after the bare question, -1 if none.
        leaf_rows, leaf_target, leaf_index: [Q] for every gold token that a leaf asks for: the row
            that predicts it in the leaf block's hidden states flattened to [B2 * L2, H], the token,
            and its leaf.
    """

    layout: Literal["tree", "padded"]
    main: Block
    leaves: Block | None
    visible: Tensor | None
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
    leaf_rows: Tensor
    leaf_target: Tensor
    leaf_index: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with every tensor on `device`."""
        return Batch(**_moved(self, device))

    @property
    def num_rationales(self) -> int:
        """R, the rationales in the batch."""
        return int(self.problem.numel())

    @property
    def teachers(self) -> list[str]:
        """[R] the teacher of each rationale."""
        return [r.teacher for p in self.problems for r in p.rationales]


def _moved(part: Block | Batch, device: torch.device | str) -> dict[str, Any]:
    """Its fields, with tensors and blocks on `device`."""
    return {
        name: value.to(device) if isinstance(value, Tensor | Block) else value
        for name, value in vars(part).items()
    }


@dataclass
class Pass:
    """What the one forward left behind, detached: all that a metric may read.

    Attributes:
        batch: what went in.
        student: body and head; a metric may read its weights but not run it.
        hidden: [B, L, H] final hidden states of the main block (what the LM head reads).
        leaf_hidden: [B2, L2, H] those of the leaf block; None without leaves, and where every leaf
            was kept from an earlier step (leaf_every > 1).
        stats: per completion token [M]: nll, lse, entropy, correct, gold_logit, gold_logp.
        leaf_logp: [A] mean log-likelihood (nats) of the gold answer's tokens at each answer leaf:
            I_i of docs/method.md. Empty without leaves.
        cache: scratch that metrics share within the pass (step graphs, hidden at the marker).
    """

    batch: Batch
    student: Student
    hidden: Tensor
    leaf_hidden: Tensor | None
    stats: TokenStats
    leaf_logp: Tensor
    cache: dict[str, object] = field(default_factory=dict)
