"""White-box teachers: local causal LMs with the student's tokenizer, loaded frozen.

They are read through `compact_ops.head_divergence`, so the logits of neither model are stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compact.data import Problem
from compact.passes import EncodedProblem, Pass
from compact.passes.forward import check_ids, token_states
from compact.passes.packing import build_batch
from compact.student import Student, load_student
from compact_ops import head_divergence


class WhiteBoxes:
    """The white-box models of the teachers of a strategy.

    Attributes:
        several: whether the teachers of the data have models of their own.
        models: teacher of the data -> its model; empty before `load`.
    """

    def __init__(
        self, strategy: str, teachers: str | Mapping[str, str], dtype: str = "bfloat16"
    ) -> None:
        """Keeps what to load.

        Args:
            strategy: its name, for messages.
            teachers: teacher of the data -> model as in `load_teacher`; one text for all.
            dtype: dtype of the weights.

        Raises:
            ValueError: `teachers` is neither.
        """
        self.several = isinstance(teachers, Mapping)
        names = [*teachers, *teachers.values()] if isinstance(teachers, Mapping) else [teachers]
        if not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"teachers of {strategy} must be a model, or a mapping from teachers of the data "
                f"to models, got {teachers!r}"
            )
        self._strategy, self._teachers, self._dtype = strategy, teachers, dtype
        self.models: dict[str, Student] = {}

    def load(
        self,
        problems: Sequence[Problem],
        processing_class: Any,
        device: torch.device | str,
    ) -> None:
        """Loads the model of each teacher of the problems; a model is loaded once.

        Args:
            problems: the problems to train on.
            processing_class: as in `load_teacher`.
            device: as in `load_teacher`.

        Raises:
            ValueError: a teacher has no model; or as in `load_teacher`.
            FileNotFoundError: as in `load_teacher`.
        """
        names = list(dict.fromkeys(r.teacher for p in problems for r in p.rationales))
        given = self._teachers
        paths = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
        missing = [name for name in names if name not in paths]
        if missing:
            raise ValueError(
                f"teachers of {self._strategy} must name a model for each of {names}, found none "
                f"for {missing}"
            )
        models = {
            path: load_teacher(path, processing_class, device, self._dtype)
            for path in dict.fromkeys(paths[name] for name in names)
        }
        self.models = {name: models[paths[name]] for name in names}

    def knows(self, teacher: str) -> bool:
        """Returns whether a teacher of the data has a white-box model."""
        return self.of(teacher) is not None

    def of(self, teacher: str) -> Student | None:
        """Returns the model of a teacher; None if an evaluation has others, or none is loaded.

        One model for all is also that of other teachers.
        """
        return self.models.get(teacher) if self.several else next(iter(self.models.values()), None)

    def read(self, problems: Sequence[EncodedProblem]) -> Iterator[tuple[Student, Tensor, Tensor]]:
        """Lets each model read the rationales of its own teachers; yields what it found.

        Yields:
            The model, [M] bool which completion tokens of the problems it has read, and its hidden
            states [M', H2] that predict these.
        """
        teachers = [r.teacher for p in problems for r in p.rationales]
        models = {id(m): m for t in teachers if (m := self.of(t)) is not None}
        for model in models.values():
            parts: list[EncodedProblem] = []
            tokens: list[bool] = []
            for problem in problems:
                mine = [self.of(r.teacher) is model for r in problem.rationales]
                for rationale, is_mine in zip(problem.rationales, mine, strict=True):
                    tokens += [is_mine] * len(rationale.ids)
                kept = tuple(compress(problem.rationales, mine))
                if kept:
                    parts.append(replace(problem, rationales=kept))
            yield model, torch.tensor(tokens), teacher_states(model, parts)


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


@torch.no_grad()
def teacher_states(teacher: Student, problems: Sequence[EncodedProblem]) -> Tensor:
    """Returns the teacher's hidden states [M, H2] that predict the problems' completion tokens.

    Raises:
        ValueError: it has no embedding for a token or a position.
    """
    check_ids(teacher, problems, leaves=False, who="white-box teacher")
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
