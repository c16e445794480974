"""Runs one forward of the student over a batch: hidden states, token statistics, answer leaves."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from compact.passes.attention import run_tree
from compact.passes.fast.lean import lean
from compact.passes.packing import Layout, build_batch
from compact.passes.segments import segment_mean
from compact.passes.transfer import put
from compact.passes.types import Batch, Block, EncodedProblem, OptionLeaves, Pass
from compact.student import Student
from compact_ops import GoldAnswers, TokenStats


def check_ids(
    student: Student,
    problems: Sequence[EncodedProblem],
    *,
    leaves: bool = True,
    who: str = "student",
) -> None:
    """Checks that the student can read each token id and position of the problems.

    Args:
        student: any model in parts.
        problems: the problems that it is to read.
        leaves: whether it reads answer leaves too.
        who: what the message calls it.

    Raises:
        ValueError: it has no embedding for one, or a problem is longer than its
            `steady_positions`; the message names the problem.
    """
    rows, limit = student.weight.shape[0], student.learned_positions
    steady = student.steady_positions
    for problem in problems:
        parts = (problem.prompt_ids, problem.gold_ids, *(r.ids for r in problem.rationales))
        largest = max((max(ids, default=0) for ids in parts), default=0)
        if largest >= rows:
            raise ValueError(
                f"question_id {problem.question_id!r}: the tokenizer gives id {largest}, but the "
                f"{who}'s embedding has {rows} rows; tokenizer and model must belong together"
            )
        longest, leaf = reach(problem, leaves)
        if limit is not None and max(longest, leaf) > limit:
            raise ValueError(
                f"question_id {problem.question_id!r}: prompt, rationale and answer leaf have "
                f"{max(longest, leaf)} tokens, but the {who} has learned {limit} positions; "
                f"max_length must be at most {limit - max(leaf - longest, 0)}"
            )
        if steady is not None and max(longest, leaf) > steady:
            raise ValueError(
                f"question_id {problem.question_id!r}: prompt, rationale and answer leaf have "
                f"{max(longest, leaf)} tokens, but {_unsteady(steady, who)}; max_length must be at "
                f"most {steady - max(leaf - longest, 0)}"
            )


def check_positions(student: Student, max_length: int, room: int) -> None:
    """Checks that no text of `max_length` tokens changes how the rest of its batch is read.

    Args:
        student: the student.
        max_length: most tokens of prompt and rationale.
        room: most tokens of an answer leaf after them.

    Raises:
        ValueError: some may, see `Student.steady_positions`.
    """
    steady = student.steady_positions
    if steady is not None and max_length + room > steady:
        raise ValueError(
            f"max_length must be at most {steady - room}, got {max_length}; "
            f"{_unsteady(steady, 'student')}, and an answer leaf may have {room} tokens"
        )


def _unsteady(steady: int, who: str) -> str:
    return (
        f"the {who} has rotary positions (longrope or dynamic) that change for a whole batch if "
        f"one text has more than {steady} tokens"
    )


def check_window(
    student: Student, problems: Sequence[EncodedProblem], *, leaves: bool = True
) -> None:
    """Checks that the student's attention reaches over every path of the problems' trees.

    Raises:
        ValueError: it does not; the message names the problem.
    """
    window = student.attention_window
    if window is None:
        return
    for problem in problems:
        tokens = max(reach(problem, leaves))
        if tokens > window:
            raise _beyond(problem, tokens, window)


def _beyond(problem: EncodedProblem, tokens: int, window: int) -> ValueError:
    return ValueError(
        f"question_id {problem.question_id!r}: prompt, rationale and answer leaf must have at most "
        f"{window} tokens in a tree, the reach of this student's attention, got {tokens}; set "
        "layout: padded"
    )


def reach(problem: EncodedProblem, leaves: bool) -> tuple[int, int]:
    """Returns the most tokens of prompt and rationale, and of these with a leaf after them."""
    longest = len(problem.prompt_ids) + max(len(r.ids) for r in problem.rationales)
    answers = [problem.gold_ids] if problem.gold_ids and leaves else []
    answers += problem.options.ids if problem.options is not None else ()
    cue = max(len(problem.cue_ids), len(problem.spaced_cue_ids))
    return longest, longest + cue + max(map(len, answers)) if answers else 0


@torch.no_grad()
def observe(
    student: Student,
    problems: Sequence[EncodedProblem],
    *,
    layout: Layout = "tree",
    leaves: bool = True,
    options: bool = False,
    statistics: Collection[str] = (),
) -> Pass:
    """Runs the student over problems without gradients, as all code outside training does.

    Args:
        student: the student; its mode (train or eval) is not changed.
        problems: P >= 1 encoded problems.
        layout: "tree" or "padded", see `compact.passes.layout.choose_layout`.
        leaves: whether to run answer leaves, which give the level I_i after each step.
        options: whether to run option leaves; the problems must be encoded with options.
        statistics: optional statistics of every completion token, as in `linear_token_stats`.

    Returns:
        The results of the forward, on the device of the student.
    """
    check_ids(student, problems, leaves=leaves)
    batch = build_batch(
        problems,
        layout=layout,
        leaves=leaves,
        options=options,
        pad_token_id=student.pad_token_id,
    )
    return run_pass(student, batch.to(student.weight.device), statistics=statistics)[2]


def run_pass(
    student: Student,
    batch: Batch,
    *,
    head_grad: str = "auto",
    filter_eps: float = 0.0,
    statistics: Collection[str] = (),
    token_weight: Tensor | None = None,
) -> tuple[TokenStats, Tensor, Pass]:
    """Runs body and head over a batch.

    Args:
        student: the student; gradients follow from torch.is_grad_enabled() and requires_grad of its
            parameters.
        batch: from `build_batch`, on the device of the student.
        head_grad: as in `linear_token_stats`.
        filter_eps: as in `linear_token_stats`.
        statistics: optional statistics of every completion token, as in `linear_token_stats`.
        token_weight: [M] what the loss multiplies each nll by, where it is known; as in
            `linear_token_stats`.

    Returns:
        The token statistics, whose nll is differentiable; the final hidden states [B, L, H] with
        their graph; and a Pass with both, detached.

    Raises:
        ValueError: a tree has more tokens on a path than the student's attention reaches.
    """
    hidden, leaf_hidden = _hidden_states(student, batch)
    live = student.token_stats(
        hidden,
        batch.target,
        rows=batch.rows,
        gold=_gold_answers(batch),
        head_grad=head_grad,
        filter_eps=filter_eps,
        statistics=statistics,
        token_weight=token_weight,
    )
    option_logp = None
    with torch.no_grad():

        def mean_logp(count: int, rows: Tensor, target: Tensor, index: Tensor) -> Tensor:
            """Returns [count] the mean log-likelihood of the target tokens of each leaf."""
            if leaf_hidden is None or not count:
                return live.nll.new_zeros(count)
            asked = student.token_stats(leaf_hidden, target, rows=rows)
            return segment_mean(-asked.nll, leaf_token_offsets(index, count))

        leaf_logp = mean_logp(
            len(batch.leaf_step), batch.leaf_rows, batch.leaf_target, batch.leaf_index
        )
        if batch.options is not None:
            options = batch.options
            count = int(_host_options(batch).offsets[-1])
            option_logp = mean_logp(count, options.rows, options.target, options.index)
    live = _without_stand_ins(live, batch)
    stats = live.map(Tensor.detach)
    detached = hidden.detach()
    return live, hidden, Pass(batch, student, detached, leaf_hidden, stats, leaf_logp, option_logp)


def leaf_token_offsets(index: Tensor, count: int) -> Tensor:
    """Returns [count + 1] offsets of the tokens of each leaf, given the leaf [Q] of each token."""
    return torch.searchsorted(index, torch.arange(count + 1, device=index.device))


def _host_options(batch: Batch) -> OptionLeaves:
    options = batch.on_host.options
    assert options is not None
    return options


def _gold_answers(batch: Batch) -> GoldAnswers:
    """Returns the table of gold answers for `linear_token_stats`, which needs one of each problem.

    Token 0 stands in for a gold answer that the data do not have.
    """
    problem = batch.problem[batch.rationale]
    if all(p.gold_ids for p in batch.problems):
        return GoldAnswers(batch.gold_ids, batch.gold_offsets, problem)
    answers = [p.gold_ids or (0,) for p in batch.problems]
    ids = put([token for answer in answers for token in answer], problem, torch.int64)
    sizes = put([0, *map(len, answers)], problem, torch.int64)
    return GoldAnswers(ids, sizes.cumsum(0), problem)


def _without_stand_ins(stats: TokenStats, batch: Batch) -> TokenStats:
    """Returns the statistics with 0 in place of what `linear_token_stats` read for stand-ins."""
    if all(p.gold_ids for p in batch.problems):
        return stats
    known = (batch.gold_offsets.diff() > 0)[batch.problem[batch.rationale]]
    assert stats.gold_logit is not None and stats.gold_logp is not None
    return stats._replace(gold_logit=stats.gold_logit * known, gold_logp=stats.gold_logp * known)


def token_states(student: Student, batch: Batch) -> Tensor:
    """Returns the hidden states [M, H] that predict the completion tokens of a batch.

    Only the body runs. Its batch may have another layout than that of another model; the order of
    the tokens is the same.

    Args:
        student: any model in parts, such as a white-box teacher; gradients as in `run_pass`.
        batch: from `build_batch`, on the device of the model.
    """
    return _hidden_states(student, batch)[0].flatten(0, 1)[batch.rows]


def _hidden_states(student: Student, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Runs the body: hidden states of the main block and of the leaf block."""
    if batch.layout == "tree":
        _check_reach(student, batch)
    with lean(student.body):
        if batch.layout == "tree":
            return run_tree(student, batch, _body)
        return _run_padded(student, batch)


def _check_reach(student: Student, batch: Batch) -> None:
    """Checks that no path of a tree is longer than the window, which the tree's mask replaces."""
    window = student.attention_window
    if window is None:
        return
    batch = batch.on_host
    blocks = [batch.main] if batch.leaves is None else [batch.main, batch.leaves]
    longest = max(int((b.position_ids * b.attention_mask).max()) + 1 for b in blocks)
    if longest > window:
        leaves = batch.leaves is not None
        problem = max(batch.problems, key=lambda problem: max(reach(problem, leaves)))
        raise _beyond(problem, longest, window)


def _body(student: Student, block: Block, mask: Any, **kwargs: Any) -> Tensor:
    """Returns the final hidden states [B, L, H] of a block."""
    output = student.body(
        input_ids=block.input_ids,
        position_ids=block.position_ids,
        attention_mask=mask,
        use_cache=False,
        **kwargs,
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def _run_padded(student: Student, batch: Batch) -> tuple[Tensor, Tensor | None]:
    hidden = _body(student, batch.main, batch.main.attention_mask)
    if batch.leaves is None:
        return hidden, None
    with torch.no_grad():
        return hidden, _body(student, batch.leaves, batch.leaves.attention_mask)
