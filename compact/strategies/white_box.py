"""White-box teachers: local causal LMs with the student's tokenizer, loaded frozen.

They are read through `compact_ops.head_divergence`, so the logits of neither model are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
