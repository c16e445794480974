"""Turns a problem into token ids: prompt, K rationales with their steps, answer cue, gold answer.

The K rationales share the prompt. The prompt is tokenised once; each rationale is tokenised on its
own and appended. The answer leaf of a step is tokenised on its own too, and appended at the end of
that step.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from compact.answers import Domain, unified
from compact.data import text_of
from compact.passes.completion import encode_completion, messages_of, plain_text, tokenise
from compact.passes.types import EncodedOptions, EncodedProblem, EncodedRationale
from compact.settings import LEAF_BUDGET
from compact.student.chat import render
from compact.text.steps import find_marker, split_steps
from compact.validity import Judgement, judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from compact.data import Problem, Text

logger = logging.getLogger(__name__)

CUE = "The answer is "
OPTION_CUE = "So the answer is"
"""The text before an option. docs/leaks.md compares it with others."""


def encode_prompt(prompt: Text, processing_class: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids of a prompt, up to the first token that the student writes.

    With a chat template, the text becomes a user message and the generation prompt follows. Without
    one, a newline follows the text unless it ends in white space, and the tokenizer adds its usual
    special tokens.

    Raises:
        ValueError: the prompt is chat messages, but the tokenizer has no chat template, or the
            template refuses them.
    """
    if processing_class.chat_template is None:
        return tuple(_plain_prompt_ids(plain_text(prompt, "prompt"), processing_class))
    text = render(messages_of(prompt, "user"), processing_class, generation_prompt=True)
    return tuple(processing_class(text, add_special_tokens=False)["input_ids"])


def encode_question(
    problem: Problem, processing_class: PreTrainedTokenizerBase, max_length: int
) -> tuple[int, ...]:
    """Token ids of the prompt of a problem.

    Raises:
        ValueError: as in `encode_prompt`, or it leaves no room for a rationale within `max_length`.
    """
    where = f"question_id {problem.question_id!r}"
    try:
        prompt_ids = encode_prompt(problem.prompt, processing_class)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if len(prompt_ids) >= max_length:
        raise ValueError(
            f"{where}: the prompt has {len(prompt_ids)} tokens, which leaves no room for a "
            f"rationale within max_length = {max_length}"
        )
    return prompt_ids


def encode_problem(
    problem: Problem,
    processing_class: PreTrainedTokenizerBase,
    *,
    max_length: int,
    leaf_budget: float = LEAF_BUDGET,
    cue: str = CUE,
    keep_tail: bool = False,
    options: bool = False,
) -> EncodedProblem:
    """Encodes one problem.

    A rationale is cut so that prompt + rationale has at most max_length tokens; so are its steps.
    Its answer is still read from the whole text: what a text states does not depend on how much of
    it the student reads.

    Args:
        problem: question, gold answer and K >= 1 rationales. Without a gold answer there are no
            answer leaves.
        processing_class: a fast tokenizer (its character offsets place the steps).
        max_length: most tokens of prompt + one rationale.
        leaf_budget: most tokens of answer leaves, as a share of the tokens of prompt and
            rationales; see `choose_leaf_steps`.
        cue: the text before the gold answer in an answer leaf.
        keep_tail: whether a rationale keeps the tokens that the chat template writes after the end
            of turn (a newline in ChatML), as in the public training code; see `Weigher.keep_tail`.
        options: whether to encode the answers that can be chosen, for option leaves.

    Returns:
        The problem as token ids, for every layout.

    Raises:
        ValueError: the problem has no rationale; the prompt leaves no room for a rationale within
            max_length; the cue has no text; the chat template changes prompt or completion; or the
            tokenizer reads the gold answer differently after a space.
        TypeError: the tokenizer gives no character offsets.
    """
    where = f"question_id {problem.question_id!r}"
    if not getattr(processing_class, "is_fast", False):
        raise TypeError(
            "processing_class must be a fast tokenizer (steps are placed by character offsets), "
            f"got {type(processing_class).__name__}"
        )
    if not problem.rationales:
        raise ValueError(f"{where}: expected at least one rationale, got none")
    if not cue.strip():
        raise ValueError(f"cue must hold text (it predicts the first answer token), got {cue!r}")
    prompt_ids = encode_question(problem, processing_class, max_length)
    room = max_length - len(prompt_ids)
    rationales = []
    for rationale in problem.rationales:
        label = f"{where}, teacher {rationale.teacher!r}"
        try:
            text, ids, ends = encode_completion(
                problem.prompt, rationale.completion, processing_class, keep_tail
            )
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
        rationales.append(
            _encode_rationale(rationale.teacher, text, ids, ends, room, problem.domain)
        )
    answer = problem.answer
    normal_gold = None if answer is None else problem.domain.normalise(answer)
    answers = unified([r.answer for r in rationales], problem.domain, normal_gold)
    rationales = [replace(r, answer=a) for r, a in zip(rationales, answers, strict=True)]
    encoded = EncodedProblem(
        question_id=problem.question_id,
        prompt=text_of(problem.prompt),
        prompt_ids=prompt_ids,
        rationales=tuple(replace(r, leaf_steps=()) for r in rationales),
        gold=normal_gold,
        gold_ids=(),
        cue_ids=(),
        spaced_cue_ids=(),
        domain=problem.domain,
    )
    if options:
        encoded = _with_options(encoded, problem, processing_class, leaf_budget)
    if answer is None:
        return encoded
    gold = answer.strip()
    cue_ids, gold_ids = _split_cue(cue.lstrip(), gold, processing_class)
    spaced_cue_ids, spaced_gold_ids = _split_cue(" " + cue.lstrip(), gold, processing_class)
    if spaced_gold_ids != gold_ids:
        raise ValueError(
            f"{where}: the tokenizer reads the gold answer {gold!r} differently when a space "
            f"stands before the cue {cue!r}; give a longer cue"
        )
    encoded = replace(
        encoded,
        gold_ids=gold_ids,
        cue_ids=cue_ids,
        spaced_cue_ids=spaced_cue_ids,
        raw_gold_ids=tuple(tokenise(answer, processing_class)[0]),
    )
    return with_leaf_steps(encoded, leaf_budget)


def with_leaf_steps(
    problem: EncodedProblem, budget: float, *, padded: bool = False
) -> EncodedProblem:
    """Returns the problem with answer leaves within a budget; without a gold answer as it is.

    Args:
        problem: the problem.
        budget: the leaf budget, see `choose_leaf_steps`.
        padded: whether rows are padded. Then each rationale repeats the prompt, and each leaf the
            prompt and the rationale up to its step.
    """
    if not problem.gold_ids:
        return problem
    prompt, rationales = len(problem.prompt_ids), problem.rationales
    leaf = max(len(problem.cue_ids), len(problem.spaced_cue_ids)) + len(problem.gold_ids) - 1
    if padded:
        ends = [end for rationale in rationales for _, end in rationale.steps]
        leaf += prompt + sum(ends) // max(len(ends), 1)
    steps = choose_leaf_steps(
        [len(r.steps) for r in rationales],
        row=prompt * (len(rationales) if padded else 1) + sum(len(r.ids) for r in rationales),
        leaf=leaf,
        budget=budget,
    )
    chosen = zip(problem.rationales, steps, strict=True)
    return replace(problem, rationales=tuple(replace(r, leaf_steps=own) for r, own in chosen))


def encode_problems(
    problems: Sequence[Problem],
    processing_class: PreTrainedTokenizerBase,
    *,
    judged: bool = True,
    **settings: Any,
) -> list[EncodedProblem]:
    """Encodes all problems of the data, and judges their rationales.

    Args:
        problems: as in `encode_problem`.
        processing_class: as in `encode_problem`.
        judged: whether every rationale gets a `judgement`. What a teacher's vote or a check is
            worth is learned from all of `problems`.
        settings: other arguments of `encode_problem`.

    Raises:
        ValueError, TypeError: as in `encode_problem`.
    """
    # Shown only where it takes a while, on a terminal as in `evaluate`.
    bar = tqdm(problems, desc="encoding", unit="problem", delay=5.0, disable=None)
    encoded = [encode_problem(problem, processing_class, **settings) for problem in bar]
    if not judged:
        return encoded
    return [with_judgements(p, found) for p, found in zip(encoded, judge(encoded), strict=True)]


def tell_of_cuts(problems: Sequence[EncodedProblem], max_length: int) -> None:
    """Warns if `max_length` cuts rationales of the problems."""
    rationales = [rationale for problem in problems for rationale in problem.rationales]
    if cut := sum(rationale.cut for rationale in rationales):
        logger.warning(
            "max_length %d cuts %d of %d rationales: the student does not read how they end; their "
            "answers are read from the whole texts",
            max_length,
            cut,
            len(rationales),
        )


def with_judgements(problem: EncodedProblem, judgements: Sequence[Judgement]) -> EncodedProblem:
    """Returns the problem with the judgements [K] of its rationales."""
    judged = zip(problem.rationales, judgements, strict=True)
    return replace(problem, rationales=tuple(replace(r, judgement=found) for r, found in judged))


def plain_rationale(teacher: str, ids: Sequence[int], text: str) -> EncodedRationale:
    """Returns a rationale of one step, made of token ids that a model wrote.

    It has no marker and no answer. Options are asked for after the bare question only, because it
    is not known what the step states.
    """
    return EncodedRationale(
        teacher=teacher,
        text=text,
        ids=tuple(ids),
        steps=((0, len(ids)),),
        step_texts=(text,),
        spaced=(not text[-1:].isspace(),),
        marker=len(ids),
        answer=None,
        option_readings=((),),
    )


def _with_options(
    encoded: EncodedProblem,
    problem: Problem,
    processing_class: PreTrainedTokenizerBase,
    budget: float,
) -> EncodedProblem:
    """Adds the options and the readings of each rationale after which they are asked for.

    The question and the steps that state no answer are always asked. The whole rationale is, in
    all rationales or in none, if the budget (most tokens of option leaves, as a share of the tokens
    of prompt and rationales) allows it.

    Raises:
        ValueError: the tokenizer reads the cue differently before different options.
    """
    domain, gold = problem.domain, encoded.gold
    found = domain.alternatives(problem.answer, encoded.prompt)
    names = [option.name for option in found]
    # A token that has the space before the option belongs to the option, so every option has the
    # same cue.
    cues, ids = set(), []
    for option in found:
        for start in ("", " "):
            text = start + OPTION_CUE
            cue_ids, option_ids = _split_cue(text, " " + option.text, processing_class)
            cues.add((start, cue_ids))
        ids.append(option_ids)
    if len(cues) > 2:
        raise ValueError(
            f"question_id {encoded.question_id!r}: the tokenizer must read the cue {OPTION_CUE!r} "
            "alike before every option"
        )
    of_start = dict(cues) or {"": (), " ": ()}
    options = EncodedOptions(
        ids=tuple(ids),
        gold=names.index(gold) if gold in names else -1,
        prompt_ids=_bare_prompt_ids(problem, processing_class),
        cue_ids=of_start[""],
        spaced_cue_ids=of_start[" "],
    )
    unstated, whole = [], []
    for rationale in encoded.rationales:
        texts = rationale.step_texts
        whole.append(tuple(range(len(texts))))
        unstated.append(tuple(i for i in whole[-1] if not domain.states(texts[i])))
    leaf = len(options.spaced_cue_ids) + sum(len(option) - 1 for option in ids)
    row = len(encoded.prompt_ids) + sum(len(r.ids) for r in encoded.rationales)
    needed = 1 + sum(len(set(readings)) for readings in zip(unstated, whole, strict=True))
    readings = zip(unstated, whole if needed * leaf <= budget * row else unstated, strict=True)
    return replace(
        encoded,
        options=options,
        rationales=tuple(
            replace(r, option_readings=tuple(dict.fromkeys(mine)))
            for r, mine in zip(encoded.rationales, readings, strict=True)
        ),
    )


def _bare_prompt_ids(
    problem: Problem, processing_class: PreTrainedTokenizerBase
) -> tuple[int, ...] | None:
    """Token ids of the prompt without its list of options; None if it has none."""
    prompt, question = problem.prompt, problem.domain.question
    bare: Text = (
        question(prompt)
        if isinstance(prompt, str)
        else [{**message, "content": question(message["content"])} for message in prompt]
    )
    return None if bare == prompt else encode_prompt(bare, processing_class)


def choose_leaf_steps(
    counts: Sequence[int], *, row: int, leaf: int, budget: float
) -> list[tuple[int, ...]]:
    """Returns the indices of the steps of each rationale that get an answer leaf.

    All steps get one if the budget allows it. Otherwise the same share of the steps of each
    rationale, at least one: the last step, and earlier steps at even distances.

    Args:
        counts: [K] number of steps of each rationale.
        row: tokens of prompt and rationales.
        leaf: tokens of one leaf.
        budget: most tokens of all leaves, including the question's, as a share of `row`.
    """
    total = sum(counts)
    if leaf * (total + 1) <= budget * row:
        return [tuple(range(n)) for n in counts]
    allowed = int(budget * row / leaf) - 1
    spare, rest = max(allowed - len(counts), 0), max(total - len(counts), 1)
    chosen = []
    for n in counts:
        mine = 1 + (n - 1) * spare // rest
        chosen.append(tuple(-(-(i + 1) * n // mine) - 1 for i in range(mine)))
    return chosen


def _encode_rationale(
    teacher: str, text: str, ids: list[int], ends: list[int], room: int, domain: Domain
) -> EncodedRationale:
    """Finds the tokens of each step and of the answer marker.

    Args:
        teacher: the teacher that wrote the rationale.
        text: the completion.
        ids: its tokens, with those that the chat template adds around it.
        ends: for each token, where its characters end in `text`: <= 0 before the text, > len(text)
            after it.
        room: most tokens to keep.
        domain: reads the final answer.
    """
    kept = ids[:room]
    steps: list[tuple[int, int]] = []
    texts: list[str] = []
    spaced: list[bool] = []
    for step in split_steps(text):
        # A token belongs to the step of its last character: " Therefore" starts between two steps.
        start = _first(ends, step.start + 1)
        end = min(_first(ends, step.end), len(ids) - 1) + 1
        if steps:
            start = max(start, steps[-1][1])
        if start >= len(kept):
            break
        end = min(end, len(kept))
        if end <= start:  # one token has the end of a step and all of the next step: skip it
            continue
        steps.append((start, end))
        last = min(ends[end - 1], len(text))
        texts.append(text[step.start : min(step.end, last)].strip())  # of a cut step: what is kept
        spaced.append(not text[:last][-1:].isspace())
    if not steps:  # cut within the first words: all kept tokens are one step
        kept_text = text[: max(ends[len(kept) - 1], 0)] if len(kept) < len(ids) else text
        steps, texts, spaced = [(0, len(kept))], [kept_text], [True]
    marker = find_marker(text)
    return EncodedRationale(
        teacher=teacher,
        text=text,
        ids=tuple(kept),
        steps=tuple(steps),
        step_texts=tuple(texts),
        spaced=tuple(spaced),
        marker=min(_first(ends, marker + 1), len(kept)) if marker < len(text) else len(kept),
        answer=domain.extract(text),
        cut=len(kept) < len(ids),
    )


def _first(ends: list[int], position: int) -> int:
    """Index of the first token that ends at or after `position` characters; len(ends) if none."""
    return bisect_left(ends, position)


def _split_cue(
    cue: str, gold: str, processing_class: PreTrainedTokenizerBase
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tokenises cue + gold as one text, so that the answer has the same tokens as within a text.

    A token that covers the end of the cue and the start of the answer (" 145") belongs to the
    answer.
    """
    ids, ends = tokenise(cue + gold, processing_class)
    border = _first(ends, len(cue) + 1)
    if border == 0:
        raise ValueError(f"cue must have its own token before the answer {gold!r}, got {cue!r}")
    return tuple(ids[:border]), tuple(ids[border:])


def _plain_prompt_ids(text: str, processing_class: PreTrainedTokenizerBase) -> list[int]:
    """Prompt ids without a chat template; removes an end-of-text token that the tokenizer adds."""
    ids = list(processing_class(text if text[-1:].isspace() else text + "\n")["input_ids"])
    if ids and ids[-1] == processing_class.eos_token_id:
        ids.pop()
    return ids


def leave_unread(
    problem: EncodedProblem, skipped: Sequence[bool], leaf_budget: float
) -> EncodedProblem:
    """Returns the problem as training reads it: what it skips is in `unread`, not in `rationales`.

    Args:
        problem: the problem.
        skipped: [K] whether training skips a rationale. If it skips all, the shortest is read, for
            a problem has at least one.
        leaf_budget: as in `encode_problem`; leaves are chosen again, for what is read.

    Raises:
        ValueError: `skipped` has not one entry for each rationale.
    """
    rationales = problem.rationales
    if len(skipped) != len(rationales):
        raise ValueError(
            f"skips must return {len(rationales)} values, one for each rationale of question_id "
            f"{problem.question_id!r}, got {len(skipped)}"
        )
    if not any(skipped):
        return problem
    kept = {k for k, skip in enumerate(skipped) if not skip}
    kept = kept or {min(range(len(rationales)), key=lambda k: len(rationales[k].ids))}
    few = replace(
        problem,
        rationales=tuple(r for k, r in enumerate(rationales) if k in kept),
        unread=tuple(r for k, r in enumerate(rationales) if k not in kept),
    )
    return with_leaf_steps(few, leaf_budget)
