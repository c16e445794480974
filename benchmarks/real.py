"""Real inputs: SmolLM2-135M and SVAMP rationales (zoo rationales if SVAMP is absent)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness import ROOT
from compact.data import Problem, Rationale, load_problems
from compact.lab import zoo
from compact.passes import EncodedProblem
from compact.passes.packing import tree_length
from compact.student import load_student, smollm2_path

SVAMP = ROOT.parent / "shared/data/svamp/train.jsonl"
CORPUS = "svamp" if SVAMP.exists() else "zoo"


def smollm2() -> tuple[Any, Any]:
    """Returns SmolLM2-135M-Instruct in float32 and its tokenizer, from the installed GGUF file."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # benchmarks.run shows its own
    bar = "transformers.modeling_gguf_pytorch_utils.tqdm"  # no setting turns it off
    with mock.patch(bar, lambda tensors, **_: tensors, create=True):
        return load_student(smollm2_path())


def problems(count: int, teachers: int) -> list[Problem]:
    """Returns `count` problems with exactly `teachers` rationales each.

    If a problem has fewer, its rationales are repeated under other names; for the cost of a step
    this makes no difference. Problems with fewer than min(teachers, 4) rationales are left out.
    """
    if CORPUS == "svamp":
        found = load_problems(SVAMP)
    else:
        names = ("good", "verbose", "style-shifted", "wrong-step")
        found = load_problems(zoo.make_rows(names, max(count, 1), seed=0))
    enough = [p for p in found if len(p.rationales) >= min(teachers, 4)][:count]
    if len(enough) < count:
        raise ValueError(f"problems: {CORPUS} has only {len(enough)} such problems, asked {count}")
    return [
        Problem(p.question_id, p.prompt, p.answer, tuple(_repeated(p.rationales, teachers)))
        for p in enough
    ]


def _repeated(rationales: tuple[Rationale, ...], count: int) -> Iterator[Rationale]:
    """Yields `count` rationales: cycles through the given ones, each under its own teacher name."""
    for i, r in zip(range(count), itertools.cycle(rationales), strict=False):
        lap = i // len(rationales)
        yield Rationale(f"{r.teacher}-{lap + 1}" if lap else r.teacher, r.completion, r.line)


def median_problem(encoded: Sequence[EncodedProblem]) -> EncodedProblem:
    """Returns the problem whose tree has the median share of the tokens of its padded rows."""

    def share(problem: EncodedProblem) -> float:
        longest = max(len(r.ids) for r in problem.rationales)
        padded = len(problem.rationales) * (len(problem.prompt_ids) + longest)
        return tree_length(problem) / padded

    return sorted(encoded, key=share)[len(encoded) // 2]


@functools.cache
def smollm2_rows(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the inputs of SmolLM2's head for real rationales.

    Args:
        count: M, how many completion tokens.

    Returns:
        hidden [M, 576] float32 final states of the tokens before, weight [49152, 576] float32,
        target [M] int64.
    """
    model, tokenizer = smollm2()
    hidden: list[Tensor] = []
    target: list[Tensor] = []
    for problem in problems(count // 40 + 1, 4):
        turn = [{"role": "user", "content": problem.prompt}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        for rationale in problem.rationales:
            ids = tokenizer(rationale.completion, add_special_tokens=False)["input_ids"]
            row = torch.tensor([[*prompt, *ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                states = model.model(input_ids=row).last_hidden_state[0]
            hidden.append(states[len(prompt) - 1 : -1])
            target.append(row[0, len(prompt) :])
        if sum(map(len, target)) >= count:
            break
    weight = model.get_output_embeddings().weight.detach().clone()
    return torch.cat(hidden)[:count], weight, torch.cat(target)[:count]
