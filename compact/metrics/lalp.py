"""Adaptability as the mean log-likelihood of each step, given only the steps just before it.

A likelihood of a whole text rewards a style that the student has read its way into. LALP asks for
each step alone, after a window of the WINDOW steps before it:
    (1/n) sum_i mean over tokens t of step i of log p(y_t | steps i - WINDOW .. i - 1, y_<t of i)
The prompt counts as the step before the first one, and the answer part, if any, as the last step.
Source: LALP (arXiv 2510.03988, "The Signal is in the Steps"). The size of the window is ours.

Every step is a row of its own, so this is a second pass of the student.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compact.metrics import register
from compact.passes import EncodedProblem, EncodedRationale, Pass
from compact.student.internals import is_sharded

WINDOW = 2
_ROWS = 32
"""Rows of a forward."""


def windows(problem: EncodedProblem, rationale: EncodedRationale) -> list[tuple[list[int], int]]:
    """Returns for each step the ids of its window and of itself, and how many of them are its own.

    A step that has no tokens before it, because the prompt is empty, is left out.
    """
    cuts = [0, *(start for start, _ in rationale.steps[1:]), rationale.steps[-1][1]]
    if cuts[-1] < len(rationale.ids):
        cuts.append(len(rationale.ids))
    parts = [problem.prompt_ids]
    parts += [rationale.ids[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
    found = []
    for i in range(1, len(parts)):
        before = [token for part in parts[max(i - WINDOW, 0) : i] for token in part]
        if before and parts[i]:
            found.append(([*before, *parts[i]], len(parts[i])))
    return found


@register(
    "lalp",
    axis="adaptability",
    runs_student=True,
    aggregation="mean over tokens, mean over steps; mean over rationales",
)
def lalp(pass_: Pass) -> Tensor:
    """Returns [R] nats per token.

    Raises:
        ValueError: the student is sharded. Each process would run it a different number of times.
    """
    student, device = pass_.student, pass_.hidden.device
    if is_sharded(student.head):
        raise ValueError(
            "lalp must be used with a whole student, in one process or ddp, got shards"
        )
    of_rationale = [windows(p, r) for p in pass_.batch.problems for r in p.rationales]
    owner = [r for r, found in enumerate(of_rationale) for _ in found]
    rows = [row for found in of_rationale for row in found]
    means = torch.zeros(len(rows), device=device)
    # Rows of like length together: less padding.
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for first in range(0, len(order), _ROWS):
        mine = order[first : first + _ROWS]
        width = len(rows[mine[-1]][0])
        ids = torch.full((len(mine), width), student.pad_token_id)
        mask = torch.zeros(len(mine), width, dtype=torch.int64)
        place, target, step = [], [], []
        for n, i in enumerate(mine):
            tokens, own = rows[i]
            ids[n, : len(tokens)] = torch.tensor(tokens)
            mask[n, : len(tokens)] = 1
            place += [n * width + t - 1 for t in range(len(tokens) - own, len(tokens))]
            target += tokens[-own:]
            step += [i] * own
        output = student.body(
            input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
        )
        nll = student.token_stats(
            output.last_hidden_state,
            torch.tensor(target, device=device),
            rows=torch.tensor(place, device=device),
        ).nll
        index = torch.tensor(step, device=device)
        count = torch.bincount(index, minlength=len(rows)).clamp(min=1)
        means.index_add_(0, index, -nll / count[index])
    index = torch.tensor(owner, device=device)
    total = torch.zeros(len(of_rationale), device=device).index_add_(0, index, means)
    return total / torch.bincount(index, minlength=len(of_rationale)).clamp(min=1)
