"""The input (`Batch`) and the results (`Pass`) of one forward: all that a metric may read.

Indexing. A batch holds P problems, R rationales, M completion tokens and A answer leaves, and the
leaves hold Q gold tokens. The tables are ordered: rationales by problem, tokens by rationale,
leaves by rationale and step. So an offsets vector of size n + 1 is enough to slice any of them. A
*row* is an index into the hidden states flattened to [B * L, H]. A completion token is predicted by
the row of the token before it. In a tree, the first tokens of all K rationales of a problem are
therefore predicted by the same row, that of the last prompt token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from compact.answers import Domain, General
from compact.passes.transfer import send, together
from compact.validity import Judgement

if TYPE_CHECKING:
    from compact.student import Student
    from compact_ops import TokenStats


@dataclass(frozen=True)
class EncodedRationale:
    """One rationale as token ids.

    Attributes:
        teacher: the name of the teacher that wrote it.
        text: the completion as text.
        ids: [T] token ids, the end-of-turn token included, and what the chat template writes after
            it if the problem was encoded with `keep_tail`.
        steps: one or more (start, end) token spans of the reasoning steps, in order, end exclusive.
        step_texts: the text of each step, aligned with `steps`.
        spaced: for each step, whether a space must stand between the end of the step and the cue.
        marker: index into `ids` of the first token of the answer marker ("The answer is"); T if
            there is no marker.
        answer: the final answer of the whole text, in the normal form of the problem's answer
            domain; None if none was found. Within a problem, answers that match have the same text:
            that of the gold answer if they match it.
        leaf_steps: indices of the steps after which an answer leaf stands, in order; None for all.
        option_readings: for each place of option leaves, the indices of the steps that are read
            before it. The first has the steps that state no answer, () if there are none; a second
            one has all steps. Empty if the problem was encoded without options.
        judgement: what the texts say about it; None if the data were not judged.
        cut: whether `ids` and `steps` leave out the end of the text, for max_length.
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
    option_readings: tuple[tuple[int, ...], ...] = ()
    judgement: Judgement | None = None
    cut: bool = False

    @property
    def asked_steps(self) -> tuple[int, ...]:
        """Indices of the steps after which the gold answer is asked for, the last one included."""
        return tuple(range(len(self.steps))) if self.leaf_steps is None else self.leaf_steps


@dataclass(frozen=True)
class EncodedOptions:
    """The answers that a problem allows, as token ids.

    Attributes:
        ids: for each of J options, the tokens of its text after the cue; () for an open question.
        gold: index of the gold option; -1 if it is unknown.
        prompt_ids: ids of the prompt without its list of options, which a small student would
            copy from; None if the prompt has no such list.
        cue_ids: ids of the cue before an option.
        spaced_cue_ids: ids of the cue with a leading space.
    """

    ids: tuple[tuple[int, ...], ...]
    gold: int
    prompt_ids: tuple[int, ...] | None
    cue_ids: tuple[int, ...]
    spaced_cue_ids: tuple[int, ...]


@dataclass(frozen=True)
class EncodedProblem:
    """One problem as token ids. A batch holds whole problems.

    Attributes:
        question_id: the id in the data file.
        prompt: the question as text.
        prompt_ids: [T] ids of the prompt, chat template applied.
        rationales: its K >= 1 rationales.
        gold: the gold answer in normal form; a rationale whose `answer` is this text is right. None
            if the data have no gold answer; the problem then has no answer leaves.
        gold_ids: [m] ids of the gold answer as the data write it, tokenised as the text that
            follows the cue; empty without a gold answer.
        cue_ids: ids of the answer cue that precedes the gold answer in an answer leaf.
        spaced_cue_ids: ids of the cue with a leading space, for steps that are `spaced`.
        raw_gold_ids: ids of the gold answer tokenised alone, as the public training code does.
        options: the answers that can be chosen; None if the problem was encoded without them.
        domain: the kind of its answers, which says when two of them match.
        unread: other rationales, which training does not read: they have weight 0 and are part of
            no pass.
    """

    question_id: str
    prompt: str
    prompt_ids: tuple[int, ...]
    rationales: tuple[EncodedRationale, ...]
    gold: str | None
    gold_ids: tuple[int, ...]
    cue_ids: tuple[int, ...]
    spaced_cue_ids: tuple[int, ...]
    raw_gold_ids: tuple[int, ...] = ()
    options: EncodedOptions | None = None
    domain: Domain = General()
    unread: tuple[EncodedRationale, ...] = ()

    @property
    def kind(self) -> str:
        """The name of its domain."""
        return self.domain.name

    @property
    def right(self) -> tuple[bool, ...]:
        """[K] whether each rationale states the gold answer; all False without a gold answer."""
        return tuple(r.answer is not None and r.answer == self.gold for r in self.rationales)


@dataclass(frozen=True)
class Block:
    """Rows of tokens.

    Attributes:
        input_ids: [B, L] int64.
        position_ids: [B, L] int64; in a tree they restart at each branch point.
        attention_mask: [B, L] int64, 1 for a token and 0 for padding. In a tree, the numbers decide
            which tokens attend to which.
        numbers, ends: tree only, [B, L] int64. Token q sees token k of the same row, in this block
            or the other, if numbers[k] <= numbers[q] < ends[k]. The tokens of a row are numbered
            depth first, over both blocks. None when padded.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    numbers: Tensor | None
    ends: Tensor | None


@dataclass(frozen=True)
class OptionLeaves:
    """The leaves that ask for the text of each option, at E places.

    A place is the end of a reading: some or all steps of a rationale, or the question alone. The
    places are ordered by rationale; the P questions come last. Every place has one leaf for each
    option of its problem, N leaves in all.

    Attributes:
        offsets: [E + 1], place e has the leaves from offsets[e] up to, but not including,
            offsets[e + 1]. A question without options has none.
        question: [P] the place after the bare question.
        unstated: [R] the place after the steps that state no answer; that of the question if there
            is no such step.
        whole: [R] the place after all steps; that of `unstated` if all steps state no answer, or if
            the leaf budget left it out.
        gold: [P] index of the gold option; -1 if it is unknown or the question has no options.
        rows, target, index: [Q'] for each token of an option: the row that predicts it in the
            flattened hidden states of the leaf block, its id, and the index of its leaf.
    """

    offsets: Tensor
    question: Tensor
    unstated: Tensor
    whole: Tensor
    gold: Tensor
    rows: Tensor
    target: Tensor
    index: Tensor


@dataclass(frozen=True)
class Batch:
    """Tensors of one forward pass.

    The main block [B, L] holds prompts and rationales. The leaf block [B2, L2] holds the answer
    leaves: the cue and the gold answer without its last token, which predicts nothing. In a tree
    B2 = B, and row b of the leaf block also attends to row b of the main block. When padded, each
    leaf is a row that repeats its whole prefix.

    Attributes:
        layout: "tree" (rationales are branches of their prompt; a problem lies in one row, or in
            several rows that repeat the prompt) or "padded" (each rationale is a row).
        main: the main block.
        leaves: the leaf block; None without leaves. If no problem has what is asked for (a gold
            answer, options), it holds one padding token: ranks with sharded parameters must run the
            body equally often.
        parts: tree only, [N, 5] int64: prompts and rationales as `tree_attention` takes them. None
            when padded.
        problems: P encoded problems.
        problem_offsets: [P + 1], problem p has the rationales from problem_offsets[p] up to, but
            not including, problem_offsets[p + 1].
        problem: [R] the problem of each rationale.
        token_offsets: [R + 1], the same for the completion tokens of each rationale.
        rows: [M] the row that predicts completion token m.
        target: [M] the id of token m.
        rationale: [M] the rationale of token m.
        step: [M] the step that token m belongs to, -1 outside every step (the answer part).
        token_rows: [M] the row of token m itself.
        gold_ids: [G] ids of all gold answers.
        gold_offsets: [P + 1], the same for the gold ids of each problem; a problem without a gold
            answer has none.
        leaf_offsets: [R + 1], the same for the answer leaves of each rationale, without the leaf
            after the bare question. All offsets are 0 without leaves.
        leaf_step: [A] index of the step that the leaf follows; -1 for the bare question. The leaves
            of the bare questions come last, in the order of the problems.
        question_leaf: [P] index of the leaf after the bare question; -1 without leaves or without a
            gold answer.
        leaf_rows, leaf_target, leaf_index: [Q] for each gold token of a leaf: the row that predicts
            it in the hidden states of the leaf block flattened to [B2 * L2, H], its id, and the
            index of its leaf.
        options: the option leaves; None without them.
        host: the same batch on the CPU, if this one is on another device; see `on_host`.
    """

    layout: Literal["tree", "padded"]
    main: Block
    leaves: Block | None
    parts: Tensor | None
    problems: tuple[EncodedProblem, ...]
    problem_offsets: Tensor
    problem: Tensor
    token_offsets: Tensor
    rows: Tensor
    target: Tensor
    rationale: Tensor
    step: Tensor
    token_rows: Tensor
    gold_ids: Tensor
    gold_offsets: Tensor
    leaf_offsets: Tensor
    leaf_step: Tensor
    question_leaf: Tensor
    leaf_rows: Tensor
    leaf_target: Tensor
    leaf_index: Tensor
    options: OptionLeaves | None = None
    host: Batch | None = None

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch on `device`, sent in one asynchronous copy; unchanged if it is there.

        `host` of the new batch is this one.
        """
        device = torch.device(device)
        tensors = list(_tensors(self))
        if all(tensor.device == device for tensor in tensors):
            return self
        return replace(_rebuilt(self, iter(send(tensors, device))), host=self)

    def in_one_buffer(self) -> Batch:
        """Returns a copy of the batch whose tensors share one storage."""
        return _rebuilt(self, iter(together(list(_tensors(self)))))

    @property
    def on_host(self) -> Batch:
        """The batch on the CPU, to read numbers from: on a GPU every other read waits for it."""
        return self if self.host is None else self.host

    @property
    def prompt_rows(self) -> Tensor:
        """[R] the row of the prompt's last token, which predicts the first token of a rationale."""
        return self.rows[self.token_offsets[:-1]]

    @property
    def num_rationales(self) -> int:
        """R, the number of rationales in the batch."""
        return int(self.problem.numel())

    @property
    def counts(self) -> list[int]:
        """[P] K, the number of rationales of each problem; read without waiting for a GPU."""
        counts: list[int] = self.on_host.problem_offsets.diff().tolist()
        return counts

    @property
    def teachers(self) -> list[str]:
        """[R] the name of the teacher of each rationale."""
        return [r.teacher for p in self.problems for r in p.rationales]


Part = TypeVar("Part", bound=Batch | Block | OptionLeaves)


def _tensors(part: Batch | Block | OptionLeaves) -> Iterator[Tensor]:
    """The tensors of a batch, in the order of its fields."""
    for value in vars(part).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Block | OptionLeaves):
            yield from _tensors(value)


def _rebuilt(part: Part, tensors: Iterator[Tensor]) -> Part:
    """Returns a batch with other tensors, given in the order of `_tensors`."""
    found: dict[str, Any] = {}
    for name, value in vars(part).items():
        if isinstance(value, Tensor):
            found[name] = next(tensors)
        elif isinstance(value, Block | OptionLeaves):
            found[name] = _rebuilt(value, tensors)
    return replace(part, **found)


@dataclass
class Pass:
    """The results of one forward, detached: all that a metric may read.

    Attributes:
        batch: the input.
        student: body and head. A metric may read its weights but must not run it.
        hidden: [B, L, H] final hidden states of the main block (the input of the LM head).
        leaf_hidden: [B2, L2, H] those of the leaf block. None without leaves, and if every level
            comes from an earlier step (leaf_every > 1).
        stats: per completion token [M]: nll, lse, entropy, correct, gold_logit, gold_logp (the last
            two are 0 in a problem without a gold answer); rank, sum_p2 and margin if the pass was
            run with these statistics, else None.
        leaf_logp: [A] the level I_i of docs/method.md at each answer leaf: the mean log-likelihood
            of the tokens of the gold answer, in nats. Empty without leaves.
        option_logp: [N] the mean log-likelihood of the tokens of the option at each option leaf, in
            nats; `batch.options` has the places. None without option leaves.
        cache: values that metrics share within the pass (step graphs, hidden at the marker).
    """

    batch: Batch
    student: Student
    hidden: Tensor
    leaf_hidden: Tensor | None
    stats: TokenStats
    leaf_logp: Tensor
    option_logp: Tensor | None = None
    cache: dict[str, object] = field(default_factory=dict)

    @classmethod
    def before(cls, batch: Batch, student: Student) -> Pass:
        """Returns a pass of a batch that the student has not read, for a policy of the data alone.

        It has batch, student and cache; reading anything else raises RuntimeError.
        """
        return cast(Pass, _Before(batch, student))


@dataclass
class _Before:
    batch: Batch
    student: Student
    cache: dict[str, object] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(
            f"{name} was read before the student ran; a weighing that reads more than the data "
            "must not say Needs(student=False)"
        )
