"""White-box teachers: local causal LMs with the student's tokenizer, loaded frozen.

They are read through `compact_ops.head_divergence`, so the logits of neither model are stored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compact.data import Problem
from compact.passes import EncodedProblem, Pass
from compact.passes.forward import token_states
from compact.passes.packing import build_batch
from compact.student import Student, load_student
from compact_ops import head_divergence

logger = logging.getLogger(__name__)

ModelOf = Callable[[str], Student | None]
"""From a teacher of the data to its white-box model; None if it has none."""


def check_teachers(strategy: str, teachers: object) -> None:
    """Raises ValueError if `teachers` of a strategy cannot be those of `load_teachers`."""
    names = [teachers]
    if isinstance(teachers, dict):
        names = [*teachers, *teachers.values()]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"teachers of {strategy} must be a model, or a mapping from teachers of the data to "
            f"models, got {teachers!r}"
        )


def load_teacher(
    name: str | Path, processing_class: Any, device: torch.device | str, dtype: str = "bfloat16"
) -> Student:
    """Returns a frozen model in eval mode, in parts.

    Args:
        name: a name on the hub, a folder (also of a run) or a .gguf file.
        processing_class: the student's tokenizer; the teacher's must have the same tokens.
        device: where the teacher runs.
        dtype: dtype of its weights.

    Raises:
        ValueError: the tokenizers differ, or the model cannot be used (see `Student.of`).
        FileNotFoundError: there is no such model.
    """
    allowed = ("bfloat16", "float16", "float32")
    if dtype not in allowed:
        raise ValueError(f"dtype of a white-box teacher must be one of {allowed}, got {dtype!r}")
    model, own = load_student(name, dtype=getattr(torch, dtype))
    if own.get_vocab() != processing_class.get_vocab():
        raise ValueError(
            f"a white-box teacher must have the student's tokens, but {name} has "
            f"{len(own)} and the student {len(processing_class)}, and they are not the same"
        )
    model.requires_grad_(False)
    return Student.of(model.to(device).eval(), processing_class)


def load_teachers(
    strategy: str,
    teachers: str | Mapping[str, str],
    problems: Sequence[Problem],
    processing_class: Any,
    device: torch.device | str,
    dtype: str,
) -> dict[str, Student]:
    """Returns the white-box model of each teacher of the problems; a model is loaded once.

    Args:
        strategy: whose `teachers` this is, for the error.
        teachers: teacher of the data -> model as in `load_teacher`; one text for all.
        problems: the problems to train on.
        processing_class: as in `load_teacher`.
        device: as in `load_teacher`.
        dtype: as in `load_teacher`.

    Raises:
        ValueError: a teacher has no model; or as in `load_teacher`.
        FileNotFoundError: as in `load_teacher`.
    """
    names = list(dict.fromkeys(r.teacher for p in problems for r in p.rationales))
    paths = dict.fromkeys(names, teachers) if isinstance(teachers, str) else teachers
    missing = [name for name in names if name not in paths]
    if missing:
        raise ValueError(
            f"teachers of {strategy} must name a model for each of {names}, found none for "
            f"{missing}"
        )
    models = {
        path: load_teacher(path, processing_class, device, dtype)
        for path in dict.fromkeys(paths[name] for name in names)
    }
    return {name: models[paths[name]] for name in names}


@torch.no_grad()
def teacher_states(teacher: Student, problems: Sequence[EncodedProblem]) -> Tensor:
    """Returns the teacher's hidden states [M, H2] that predict the problems' completion tokens."""
    batch = build_batch(
        problems, layout="padded", leaves=False, pad_token_id=teacher.pad_token_id
    ).to(teacher.weight.device)
    return token_states(teacher, batch)


def model_of(
    teachers: str | Mapping[str, str], models: Mapping[str, Student], teacher: str
) -> Student | None:
    """Returns the white-box model of a teacher; None if an evaluation has other teachers.

    Args:
        teachers: as in `load_teachers`; one model for all is also that of other teachers.
        models: what `load_teachers` returned.
        teacher: its name in the data.
    """
    return next(iter(models.values())) if isinstance(teachers, str) else models.get(teacher)


def read_by_models(
    problems: Sequence[EncodedProblem], find: ModelOf
) -> Iterator[tuple[Student, Tensor, Tensor]]:
    """Lets each white-box model read the rationales of its own teachers; yields what it found.

    Yields:
        The model, [M] bool which completion tokens of the problems it has read, and its hidden
        states [M', H2] that predict these.
    """
    teachers = [r.teacher for p in problems for r in p.rationales]
    models = {id(m): m for t in teachers if (m := find(t)) is not None}
    for model in models.values():
        parts: list[EncodedProblem] = []
        tokens: list[bool] = []
        for problem in problems:
            mine = [find(r.teacher) is model for r in problem.rationales]
            for rationale, is_mine in zip(problem.rationales, mine, strict=True):
                tokens += [is_mine] * len(rationale.ids)
            kept = tuple(compress(problem.rationales, mine))
            if kept:
                parts.append(replace(problem, rationales=kept))
        yield model, torch.tensor(tokens), teacher_states(model, parts)


def with_model(weight: Tensor, teachers: Sequence[str], find: ModelOf, told: set[str]) -> Tensor:
    """Returns weights [R] without the rationales whose teacher has no white-box model.

    An evaluation may have such teachers. Their divergence is unknown, and 0 would be the best one.
    So the other weights of the pass are scaled to the same sum.

    Args:
        weight: [R] weights.
        teachers: [R] the teacher of each rationale.
        find: see `ModelOf`.
        told: teachers of which the log has told before; new ones are added.
    """
    unknown = {teacher for teacher in teachers if find(teacher) is None}
    if not unknown:
        return weight
    if unknown - told:
        logger.warning(
            "evaluation: the divergence leaves out %s, which have no white-box model",
            ", ".join(sorted(unknown)),
        )
        told |= unknown
    kept = weight * weight.new_tensor([float(teacher not in unknown) for teacher in teachers])
    return kept * (weight.sum() / kept.sum().clamp(min=torch.finfo(kept.dtype).tiny))


def divergence(
    hidden: Tensor, student: Student, states: Tensor, teacher: Student, kind: str = "forward"
) -> Tensor:
    """Returns [M] divergences of the student from the teacher, see `head_divergence`.

    Some models pad their vocabulary; the rows that both heads have are compared.

    Args:
        hidden: [M, H] hidden states of the student.
        student: its head.
        states: [M, H2] hidden states of the teacher.
        teacher: its head.
        kind: "forward", "reverse" or "jsd".
    """
    both = min(student.weight.shape[0], teacher.weight.shape[0])
    biases = [None if m.bias is None else m.bias[:both] for m in (student, teacher)]
    return head_divergence(
        hidden,
        student.weight[:both],
        states,
        teacher.weight[:both],
        kind=kind,
        bias=biases[0],
        softcap=student.softcap,
        logit_scale=student.logit_scale,
        teacher_bias=biases[1],
        teacher_softcap=teacher.softcap,
        teacher_logit_scale=teacher.logit_scale,
    )


def completion_states(hidden: Tensor, pass_: Pass) -> Tensor:
    """Returns the rows [M, H] of hidden states [B, L, H] that predict the completion tokens."""
    return hidden.flatten(0, 1)[pass_.batch.rows]
