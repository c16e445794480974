"""Chooses the layout of a student's batches, trees or padded rows, and gives the reason."""

from __future__ import annotations

import torch
from torch import Tensor

from compact.passes import EncodedProblem, EncodedRationale
from compact.passes.forward import observe
from compact.passes.packing import Layout
from compact.student import Student, evaluating
from compact.student.internals import attention_implementation

# Layers whose keys a mask can select. Linear attention, state-space layers and convolutions read
# all earlier tokens of the row, also those of other rationales.
_MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
_MASKED_ATTENTION = {"sdpa", "eager", "flex_attention"}
LEAF_ROOM = 32  # tokens that an answer leaf may reach beyond max_length, where none is known
# Largest relative difference of hidden states between tree and padded rows in the trial below. If a
# branch sees another branch, they differ by tens of per cent. Rounding alone gives 1e-6 in float32
# and less than 1e-2 in bfloat16.
_TRIAL_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}


def choose_layout(
    student: Student, requested: str, max_length: int, leaf_room: int = LEAF_ROOM
) -> tuple[Layout, str]:
    """Chooses the layout of a student's batches.

    Args:
        student: the student, on the device where it will run.
        requested: "auto", "tree" or "padded".
        max_length: the largest number of tokens of a prompt plus one rationale.
        leaf_room: the largest number of tokens of an answer leaf after them.

    Returns:
        The layout, and the reason as text for the log.

    Raises:
        ValueError: `requested` is "tree" and this student cannot use trees, or is unknown.
    """
    if requested not in ("auto", "tree", "padded"):
        raise ValueError(f"layout must be 'auto', 'tree' or 'padded', got {requested!r}")
    if requested == "padded":
        return "padded", "as asked"
    obstacle = tree_obstacle(student, max_length, leaf_room)
    if obstacle is None:
        return "tree", "the prompt is read once; on a trial the tree equals padded rows"
    if requested == "tree":
        raise ValueError(
            f"layout must be 'auto' or 'padded' for this student, got 'tree': {obstacle}"
        )
    return "padded", obstacle


def tree_obstacle(student: Student, max_length: int, leaf_room: int = LEAF_ROOM) -> str | None:
    """Returns why a student cannot use trees; None if it can.

    First the config is checked. Then a trial on a few tokens compares tree and padded rows. It also
    catches what the config does not say.
    """
    config = student.config
    attention = attention_implementation(config)
    if attention not in _MASKED_ATTENTION:
        return f"attention {attention!r} takes no arbitrary mask"
    layer_types = getattr(config, "layer_types", None) or []
    other = sorted(set(layer_types) - _MASKED_LAYERS)
    if other:
        return f"layers of type {', '.join(other)} read a row token by token, whatever the mask"
    window = student.attention_window
    if window is not None and window < max_length + leaf_room:
        return (
            f"its attention reaches {window} tokens, less than max_length = {max_length} and "
            f"{leaf_room} for the answer"
        )
    try:
        error = _trial(student)
    except Exception as failure:  # the model's code may raise anything; padded rows are used then
        return f"a trial with a tree mask failed: {type(failure).__name__}: {failure}"
    tolerance = _TRIAL_TOLERANCE.get(student.weight.dtype, 3e-2)
    if not error <= tolerance:
        return f"on a trial the tree differs from padded rows by {error:.2g} (relative)"
    return None


@torch.no_grad()
def _trial(student: Student) -> float:
    """Returns the relative difference of hidden states, tree to padded, on two short rationales."""
    vocabulary = student.weight.shape[0]
    ids = [(7 * i + 3) % vocabulary for i in range(24)]

    def rationale(teacher: str, start: int, end: int) -> EncodedRationale:
        part = tuple(ids[start:end])
        return EncodedRationale(teacher, "", part, ((0, 3),), ("",), (False,), len(part), None)

    problem = EncodedProblem(
        question_id="trial",
        prompt="",
        prompt_ids=tuple(ids[:5]),
        rationales=(rationale("a", 5, 10), rationale("b", 10, 17)),
        gold="",
        gold_ids=tuple(ids[17:19]),
        cue_ids=tuple(ids[19:21]),
        spaced_cue_ids=tuple(ids[21:23]),
    )
    with evaluating(student.body):
        padded = _hidden(student, problem, "padded")
        tree = _hidden(student, problem, "tree")
    return float((tree - padded).norm() / padded.norm())


def _hidden(student: Student, problem: EncodedProblem, layout: Layout) -> Tensor:
    """Returns [T + Q, H] float32 hidden states of every rationale token and every leaf token."""
    pass_ = observe(student, [problem], layout=layout)
    batch = pass_.batch
    assert pass_.leaf_hidden is not None
    tokens = pass_.hidden.flatten(0, 1)[batch.token_rows]
    leaves = pass_.leaf_hidden.flatten(0, 1)[batch.leaf_rows]
    return torch.cat([tokens, leaves]).float()
