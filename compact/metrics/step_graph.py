"""Consensus as the support of a rationale's steps, with a bonus for ending on the mainstream path.

Steps of different teachers match when each is the other's best match, their similarity is >= 0.8
and order is preserved. The connected components are step classes. The support of a class is its
number of teachers / K. The mainstream path is the path of the DAG of classes with the largest sum
of support; equally heavy paths all count. C_k = mean support of k's steps + 0.5 [k's final class
lies on the mainstream path]. The order of the teachers never breaks a tie. Similarity of steps with
mathematics: an equation in common, or else the Jaccard index of their numbers; of other steps: the
cosine of their mean hidden states. Source: the abstract of COMPACT (arXiv 2601.13992), "graph-based
consensus ... mainstream reasoning paths"; completed in the design notes.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from compact.graphs.step_graphs import Graphs, Steps, build_graphs, describe_steps
from compact.metrics import register
from compact.passes import Batch, Pass
from compact.passes.segments import segment_mean
from compact.passes.transfer import put, send

MAINSTREAM_BONUS = 0.5


def step_states(pass_: Pass) -> Tensor:
    """Returns [S, H] float32 mean hidden state of each step, steps in order over all rationales."""
    batch = pass_.batch
    host = batch.on_host
    counts = torch.tensor([len(r.steps) for p in batch.problems for r in p.rationales])
    first = torch.cumsum(counts, 0) - counts
    inside = host.step >= 0
    index = (first[host.rationale] + host.step)[inside]  # in order: steps follow each other
    sizes = torch.bincount(index, minlength=int(counts.sum()))
    offsets = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    rows, offsets = send([host.token_rows[inside], offsets], pass_.hidden.device)
    return segment_mean(pass_.hidden.flatten(0, 1)[rows].float(), offsets)


def step_texts(batch: Batch) -> list[list[tuple[str, ...]]]:
    """Returns the texts of the steps of every rationale of every problem."""
    return [[r.step_texts for r in problem.rationales] for problem in batch.problems]


def step_graphs(pass_: Pass) -> tuple[Steps, Graphs]:
    """Returns the steps and their graphs; cached in the pass."""
    if "step_graphs" not in pass_.cache:
        steps = describe_steps(step_texts(pass_.batch), step_states(pass_).cpu().numpy())
        pass_.cache["step_graphs"] = steps, build_graphs(steps)
    return pass_.cache["step_graphs"]  # type: ignore[return-value]


def consensus(steps: Steps, graphs: Graphs) -> np.ndarray:
    """Returns [R] C_k of every rationale."""
    counts = np.diff(steps.step_offsets)
    total = np.add.reduceat(graphs.support[graphs.step_class], steps.step_offsets[:-1])
    final = graphs.step_class[steps.step_offsets[1:] - 1]
    scores: np.ndarray = total / counts + MAINSTREAM_BONUS * graphs.mainstream[final]
    return scores


@register(
    "step-graph", axis="consensus", aggregation="mean over steps + bonus; mean over rationales"
)
def step_graph(pass_: Pass) -> Tensor:
    """Returns [R] consensus in 1/K..1.5."""
    scores = consensus(*step_graphs(pass_))
    return put(scores.tolist(), pass_.hidden, torch.float64)
