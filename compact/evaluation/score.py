"""Scores and weighs rationales without training, to audit or filter data.

One row per rationale: question_id, teacher, answer (the extracted final answer), validity,
adaptability, consensus, difficulty, weight, basis (what its answer was judged by), findings (what
speaks against it, in words), steps (text and gain in nats), epiphanies (indices of steps). Scores
are appended to OUT.partial after each pass, so a killed run can resume. The weights depend on the
spread of the scores over all data, so OUT is written at the end, in one piece. --graphs also saves
the consensus graph of every problem; `compact graph` draws one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from compact.data import Problem
from compact.files import ANY_NUMBER, SHARE
from compact.graphs.step_graphs import as_rustworkx, save_graph
from compact.metrics import AXES
from compact.metrics.gain import step_gains
from compact.metrics.judged import judgements
from compact.metrics.step_graph import step_graphs, step_texts
from compact.passes import EncodedProblem, Pass
from compact.passes.encode import encode_problems, tell_of_cuts, with_leaf_steps
from compact.passes.forward import observe
from compact.passes.layout import choose_layout
from compact.passes.packing import tree_length
from compact.resumable import rows_at
from compact.settings import LEAF_BUDGET, MAX_LENGTH
from compact.student import Student
from compact.weighting import PresetWeigher, Weigher

_LONGEST_NAME = 200  # of a file, without its ending: file systems allow 255 bytes
# Enough to keep a processor busy. With more, a killed run would lose more work.
_TOKENS_A_PASS = 1024
# A row of the partial file: the rows of a problem, with what is needed to weigh them.
_SCORE = (ANY_NUMBER, None)
_ROWS: Any = {
    "rows": [
        {
            "teacher": str,
            "weight": (SHARE, None),
            **dict.fromkeys(map(str, AXES), _SCORE),
            "steps": [{"text": str, "gain": _SCORE}],
            "epiphanies": [int],
        }
    ]
}


def score_problems(
    student: Student,
    processing_class: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    weigher: Weigher,
    *,
    max_length: int = MAX_LENGTH,
    leaf_budget: float = LEAF_BUDGET,
    partial: Path | None = None,
    settings: dict[str, Any] | None = None,
    graphs: Path | None = None,
) -> list[dict[str, Any]]:
    """Scores every rationale and weighs it within its problem.

    Args:
        student: the student that scores; it is not changed.
        processing_class: its tokenizer.
        problems: problems with their rationales.
        weigher: a new preset or policy; its statistics become those of `problems`.
        max_length: most tokens of the prompt and one rationale.
        leaf_budget: as in `encode_problem`; steps without an answer leaf have no gain.
        partial: file that the scores are saved to, and that a killed run resumes from; None: none.
        settings: what the saved scores depend on; a file with other settings is refused.
        graphs: folder for the consensus graphs, one file per problem; None: none are saved.

    Returns:
        One row per rationale, in the order of the data.

    Raises:
        ValueError: a problem cannot be encoded, a metric cannot be used, or `partial` has other
            settings.
    """
    with rows_at(partial, settings or {}, key="question_id", shape=_ROWS) as store:
        found = store.done
        layout = "padded" if weigher.needs.padded else choose_layout(student, "auto", max_length)[0]
        # What a vote or a check is worth is learned from all problems, those found earlier too.
        encoded = encode_problems(
            problems,
            processing_class,
            max_length=max_length,
            leaf_budget=leaf_budget,
            keep_tail=weigher.keep_tail,
            options=weigher.needs.options,
        )
        tell_of_cuts(encoded, max_length)
        left = [p for p in encoded if p.question_id not in found]
        if layout == "padded":
            left = [with_leaf_steps(p, leaf_budget, padded=True) for p in left]
        with tqdm(total=len(problems), initial=len(found), desc="score", unit="problem") as bar:
            for chunk in passes_of(left):
                pass_ = observe(
                    student,
                    chunk,
                    layout=layout,
                    options=weigher.needs.options,
                    statistics=weigher.needs.statistics,
                )
                if graphs:
                    _save_graphs(pass_, graphs)
                for question_id, rows in _rows(pass_, weigher):
                    store.append({"question_id": question_id, "rows": rows})
                bar.update(len(chunk))
    scored: list[list[dict[str, Any]]] = [found[p.question_id]["rows"] for p in problems]
    if isinstance(weigher, PresetWeigher):
        _weigh(scored, weigher)
    return [row for problem in scored for row in problem]


def passes_of(problems: Sequence[EncodedProblem]) -> Iterable[list[EncodedProblem]]:
    """Yields the problems of one pass at a time; they have similar lengths."""
    chunk: list[EncodedProblem] = []
    for problem in sorted(problems, key=tree_length):
        if chunk and (len(chunk) + 1) * tree_length(problem) > _TOKENS_A_PASS:
            yield chunk
            chunk = []
        chunk.append(problem)
    if chunk:
        yield chunk


def _rows(pass_: Pass, weigher: Weigher) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """Yields (question_id, rows of its rationales); `_weigh` fills in the weights of a preset."""
    if isinstance(weigher, PresetWeigher):
        scores, weight = weigher.score(pass_), None
    else:
        scores, weight = {}, weigher(pass_).used.tolist()
    listed = {axis: values.tolist() for axis, values in scores.items()}
    judged = judgements(pass_)
    found = step_gains(pass_)
    gains, epiphanies, offsets = (x.tolist() for x in (found.gain, found.epiphany, found.offsets))
    r = 0
    for problem in pass_.batch.problems:
        rows = []
        for rationale in problem.rationales:
            first, asked = offsets[r], rationale.asked_steps
            gain = {i: round(gains[first + n], 5) for n, i in enumerate(asked)}
            steps = [
                {"text": text, "gain": gain.get(i)} for i, text in enumerate(rationale.step_texts)
            ]
            of_axes = {str(axis): listed[axis][r] if axis in listed else None for axis in AXES}
            rows.append(
                {
                    "question_id": problem.question_id,
                    "teacher": rationale.teacher,
                    "answer": rationale.answer,
                    **of_axes,
                    "weight": weight[r] if weight else None,
                    "basis": judged[r].basis,
                    "findings": [asdict(finding) for finding in judged[r].findings],
                    "steps": steps,
                    "epiphanies": [i for n, i in enumerate(asked) if epiphanies[first + n]],
                }
            )
            r += 1
        yield problem.question_id, rows


def _save_graphs(pass_: Pass, folder: Path) -> None:
    """Saves the consensus graph of every problem as QUESTION_ID.json."""
    found, texts = step_graphs(pass_)[1], step_texts(pass_.batch)
    for i, problem in enumerate(pass_.batch.problems):
        teachers = [rationale.teacher for rationale in problem.rationales]
        path = folder / f"{_file_name(problem.question_id)}.json"
        save_graph(as_rustworkx(found, i, texts[i], teachers), path)


def _file_name(question_id: str) -> str:
    """Returns a file name for a question. A name that would be too long is cut and gets a hash."""
    name = quote(question_id, safe=" ")
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 17]}-{sha256(name.encode()).hexdigest()[:16]}"


def _weigh(problems: list[list[dict[str, Any]]], weigher: PresetWeigher) -> None:
    """Fills in the weights of a preset, with the spread of all scores."""
    flat = [row for rows in problems for row in rows]
    scores = {axis: torch.tensor([row[axis] for row in flat]) for axis in weigher.all_metrics}
    offsets = torch.tensor([0, *(len(rows) for rows in problems)]).cumsum(0)
    weigher.update(scores, offsets)
    for row, weight in zip(flat, weigher.weigh(scores, offsets).used.tolist(), strict=True):
        row["weight"] = weight


def parse_metrics(pairs: Sequence[str]) -> dict[str, str]:
    """Reads "axis=metric" overrides.

    Raises:
        ValueError: a text does not have this form, or the axis is unknown.
    """
    overrides: dict[str, str] = {}
    for pair in pairs:
        axis, equals, metric = pair.partition("=")
        if not equals or axis not in AXES or not metric:
            raise ValueError(f"--metric must be AXIS=NAME with axis in {list(AXES)}, got {pair!r}")
        overrides[axis] = metric
    return overrides
