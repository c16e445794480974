"""The teacher zoo: generated word problems with teachers of known quality, to test weightings.

A story starts with a number of things and changes it two or three times. Each teacher explains the
same story in its own way. It is known which of them are right. So a weighting can be scored by the
weight it puts on right rationales (zoo A) and by what the student learns (zoo B, where the majority
is wrong). Half of the errors are slips (7 + 5 = 13). The other half are misreadings (7 + 6 = 13):
their arithmetic is right, so no check of the arithmetic can find them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Operation = Literal["add", "subtract", "double"]

NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Ida", "Max")
THINGS = ("apples", "books", "coins", "shells", "stamps", "marbles", "cards", "pens")
GAINS = ("buys", "finds", "wins", "gets")
LOSSES = ("gives away", "loses", "sells", "drops")
FILLERS = (
    "Okay, let me think about this carefully.",
    "Hmm, wait, this is an interesting question.",
    "So, let us take our time here.",
    "However, it is good to be careful.",
)
LARGEST = 30


@dataclass(frozen=True)
class Move:
    """One change of the count.

    Attributes:
        operation: "add", "subtract" or "double".
        amount: how many things are added or subtracted; unused by "double".
        verb: the verb that the story uses.
    """

    operation: Operation
    amount: int
    verb: str

    def apply(self, value: int) -> int:
        """Returns the count after the move."""
        if self.operation == "add":
            return value + self.amount
        return value - self.amount if self.operation == "subtract" else value * 2

    def equation(self, before: int, after: int, misread: bool) -> str:
        """Returns the equation of a teacher that goes from `before` to `after` in this move.

        Args:
            before: the count before the move.
            after: the count that the teacher finds, right or wrong.
            misread: whether a wrong teacher changes the operation so that the equation holds.
        """
        if misread and after != self.apply(before):
            return f"{before} {'+' if after >= before else '-'} {abs(after - before)} = {after}"
        if self.operation == "double":
            return f"{before} * 2 = {after}"
        return f"{before} {'+' if self.operation == 'add' else '-'} {self.amount} = {after}"


@dataclass(frozen=True)
class Story:
    """A word problem: who, what, how many at the start, and the moves."""

    name: str
    things: str
    start: int
    moves: tuple[Move, ...]

    @property
    def values(self) -> tuple[int, ...]:
        """The count at the start and after every move."""
        values = [self.start]
        for move in self.moves:
            values.append(move.apply(values[-1]))
        return tuple(values)

    @property
    def answer(self) -> int:
        """The count at the end."""
        return self.values[-1]

    def happening(self, move: Move) -> str:
        """Returns the text of a move in the question."""
        if move.operation == "double":
            return f"{self.name} doubles the number of {self.things}"
        more = " more" if move.operation == "add" else ""
        return f"{self.name} {move.verb} {move.amount}{more}"

    @property
    def question(self) -> str:
        """The prompt."""
        told = " ".join(f"Then {self.happening(move)}." for move in self.moves)
        return (
            f"{self.name} has {self.start} {self.things}. {told} "
            f"How many {self.things} does {self.name} have now?"
        )


def make_story(
    rng: random.Random, *, moves: tuple[int, int] = (2, 3), largest: int = LARGEST
) -> Story:
    """Draws a story whose counts are all in 1..largest.

    Args:
        rng: random generator.
        moves: least and greatest number of moves.
        largest: greatest count. It is small, so that a tiny student can learn the arithmetic.
    """
    value = start = rng.randint(3, largest // 2)
    chosen: list[Move] = []
    for _ in range(rng.randint(*moves)):
        options: list[Move] = []
        if value < largest:
            options.append(Move("add", rng.randint(1, min(9, largest - value)), rng.choice(GAINS)))
        if value > 1:
            options.append(Move("subtract", rng.randint(1, min(9, value - 1)), rng.choice(LOSSES)))
        if 2 * value <= largest and not any(m.operation == "double" for m in chosen):
            options.append(Move("double", 0, "doubles"))
        chosen.append(rng.choice(options))
        value = chosen[-1].apply(value)
    return Story(rng.choice(NAMES), rng.choice(THINGS), start, tuple(chosen))


# --- wordings: functions that write a rationale from its equations, one per move ---------------


def _plain(story: Story, equations: Sequence[str], answer: int) -> str:
    lines = [f"{story.name} starts with {story.start} {story.things}."]
    for move, equation in zip(story.moves, equations, strict=True):
        lines.append(f"{story.happening(move)}, so {equation}.")
    return "\n".join([*lines, f"The answer is {answer}"])


def _verbose(story: Story, equations: Sequence[str], answer: int) -> str:
    name, things = story.name, story.things
    lines = [
        f"At the start of the story, {name} has {story.start} {things}, and this is the number "
        f"of {things} that we begin with."
    ]
    for move, equation in zip(story.moves, equations, strict=True):
        lines.append(
            f"After that, {story.happening(move)}, which changes the number of {things} that "
            f"{name} has, and so we compute {equation}."
        )
    lines.append(f"Nothing else happens in the story, and so {name} ends with {answer} {things}.")
    return "\n".join([*lines, f"The answer is {answer}"])


def _terse(story: Story, equations: Sequence[str], answer: int) -> str:
    return "\n".join([*(e.replace(" ", "") for e in equations), f"The answer is {answer}"])


def _friendly(story: Story, equations: Sequence[str], answer: int) -> str:
    lines = [f"We begin with {story.start} {story.things}."]
    for move, equation in zip(story.moves, equations, strict=True):
        lines.append(f"Now {story.happening(move)}: {equation}.")
    return "\n".join([*lines, f"The answer is {answer}"])


Wording = Callable[[Story, Sequence[str], int], str]


def _told(story: Story, values: Sequence[int], wording: Wording, misread: bool = False) -> str:
    """Writes the rationale of a teacher.

    Args:
        story: the story.
        values: the teacher's counts at the start and after every move.
        wording: how the teacher writes.
        misread: see `Move.equation`.
    """
    equations = [
        move.equation(before, after, misread)
        for move, before, after in zip(story.moves, values[:-1], values[1:], strict=True)
    ]
    return wording(story, equations, values[-1])


def _carried(story: Story, errors: Sequence[int]) -> list[int]:
    """Returns the counts of a teacher that adds errors[i] in move i and continues from there."""
    values = [story.start]
    for move, error in zip(story.moves, errors, strict=True):
        values.append(move.apply(values[-1]) + error)
    return values


def with_filler(completion: str, rng: random.Random, repeats: int) -> str:
    """Puts `repeats` sentences without content before the first step and after every step.

    The last line of `completion`, the answer, gets none.
    """
    *steps, answer = completion.split("\n")

    def padding() -> list[str]:
        return [rng.choice(FILLERS) for _ in range(repeats)]

    lines = padding()
    for step in steps:
        lines += [step, *padding()]
    return "\n".join([*lines, answer])


def _error(rng: random.Random, lowest: int, highest: int) -> int:
    """Returns an error e in -3..3, not 0, with lowest + e >= 0 and highest + 2 e < 99."""
    return rng.choice(
        [e for e in (-3, -2, -1, 1, 2, 3) if lowest + e >= 0 and highest + 2 * e < 99]
    )


# --- teachers --------------------------------------------------------------------------------


def good(story: Story, rng: random.Random) -> str:
    """Right and short."""
    return _told(story, story.values, _plain)


def verbose(story: Story, rng: random.Random) -> str:
    """Right, in many words."""
    return _told(story, story.values, _verbose)


def filler(story: Story, rng: random.Random) -> str:
    """Right, with two sentences without content before, between and after the steps."""
    return with_filler(good(story, rng), rng, 2)


def style_shifted(story: Story, rng: random.Random) -> str:
    """Right, as bare equations without spaces."""
    return _told(story, story.values, _terse)


def friendly(story: Story, rng: random.Random) -> str:
    """Right, in another wording than `good`."""
    return _told(story, story.values, _friendly)


def wrong_step(story: Story, rng: random.Random) -> str:
    """One result is wrong, the next steps continue from it, and the answer is wrong."""
    where = rng.randrange(len(story.moves))
    errors = [0] * len(story.moves)
    after = story.values[where + 1 :]
    errors[where] = _error(rng, min(after), max(after))
    return _told(story, _carried(story, errors), _plain, misread=rng.random() < 0.5)


def right_answer_wrong_steps(story: Story, rng: random.Random) -> str:
    """One intermediate count is wrong everywhere, but the answer is right."""
    where = rng.randrange(1, len(story.moves))
    values = list(story.values)
    values[where] += _error(rng, values[where], values[where])
    return _told(story, values, _plain, misread=rng.random() < 0.5)


def unrelated(story: Story, rng: random.Random) -> str:
    """A right rationale for another problem, which has another answer."""
    other = story
    while other.answer == story.answer:
        other = make_story(rng, moves=(len(story.moves),) * 2)
    return _told(other, other.values, _plain)


def specialist(story: Story, rng: random.Random) -> str:
    """Right on additions only; the result of every other move is 1 too large."""
    errors = [int(move.operation != "add") for move in story.moves]
    return _told(story, _carried(story, errors), _plain)


def _any_wording(rng: random.Random) -> Wording:
    """Returns one of two wordings, so that in zoo B the wording does not show who is right."""
    return rng.choice((_plain, _friendly))


def honest(story: Story, rng: random.Random) -> str:
    """Right, in one of the two wordings that the colluding teachers use."""
    return _told(story, story.values, _any_wording(rng))


def colluding(story: Story, rng: random.Random) -> str:
    """Misreads the last move: the answer is 2 too large, the same as of the other colluder."""
    errors = [0] * (len(story.moves) - 1) + [2]
    return _told(story, _carried(story, errors), _any_wording(rng), misread=True)


TEACHERS: dict[str, Callable[[Story, random.Random], str]] = {
    "good": good,
    "verbose": verbose,
    "filler": filler,
    "style-shifted": style_shifted,
    "friendly": friendly,
    "wrong-step": wrong_step,
    "right-answer-wrong-steps": right_answer_wrong_steps,
    "unrelated": unrelated,
    "specialist": specialist,
    "honest": honest,
    "colluding-a": colluding,
    "colluding-b": colluding,
}
"""Every teacher, by its name in the data."""

RIGHT = frozenset({"good", "verbose", "filler", "style-shifted", "friendly", "honest"})
"""The teachers whose rationales are right in every step and in the answer."""


@dataclass(frozen=True)
class Zoo:
    """A set of teachers with training problems and test questions.

    Attributes:
        name: its key in `ZOOS`.
        teachers: names from `TEACHERS`.
        problems: number of training problems, each with one rationale of every teacher.
        questions: number of test questions.
        moves: least and greatest number of moves of a story.
    """

    name: str
    teachers: tuple[str, ...]
    problems: int = 300
    questions: int = 200
    moves: tuple[int, int] = (2, 3)

    def rows(self, seed: int) -> list[dict[str, str]]:
        """Returns the training rows of a seed; see `make_rows`."""
        return make_rows(self.teachers, self.problems, seed, moves=self.moves)

    def labelled_rows(self, seed: int) -> list[dict[str, object]]:
        """Returns the training rows of a seed with a field `right`."""
        return [{**row, "right": row["teacher"] in RIGHT} for row in self.rows(seed)]

    def test_rows(self, seed: int) -> list[dict[str, str]]:
        """Returns test questions that are not among the training questions of the same seed."""
        seen = {row["prompt"] for row in self.rows(seed)}
        return make_questions(self.questions, seed, moves=self.moves, exclude=seen)

    def sized(self, problems: int, questions: int) -> Zoo:
        """Returns the same zoo with other numbers of problems and questions."""
        return replace(self, problems=problems, questions=questions)


ZOOS = {
    "a": Zoo("a", ("good", "verbose", "wrong-step", "unrelated")),
    "b": Zoo("b", ("honest", "colluding-a", "colluding-b")),
    "c": Zoo("c", ("good", "verbose", "wrong-step", "unrelated", "right-answer-wrong-steps")),
}
"""Zoo A: teachers with independent errors; the measure is the weight on right rationales.
Zoo B: the majority is wrong; the measure is what the student learns.
Zoo C: zoo A with a teacher whose wrong steps end in the right answer.

In zoo B all three teachers draw their wording at random. If each teacher had a fixed wording and
the honest one shared its wording with one other, a student that decodes greedily would see one
right and one wrong answer in that wording: a tie, not a wrong majority.
"""


def make_rows(
    teachers: Sequence[str], problems: int, seed: int, *, moves: tuple[int, int] = (2, 3)
) -> list[dict[str, str]]:
    """Returns rationales in the data format: question_id, prompt, teacher, completion, answer.

    The story of a problem depends only on the seed and the problem's number. The text of a teacher
    depends only on these and the teacher's name. So another teacher changes no other row.

    Args:
        teachers: names from `TEACHERS`; each writes one rationale per problem.
        problems: number of problems.
        seed: seed of the stories and texts.
        moves: least and greatest number of moves of a story.

    Raises:
        ValueError: a name is not in `TEACHERS`.
    """
    unknown = sorted(set(teachers) - TEACHERS.keys())
    if unknown:
        raise ValueError(f"teachers: expected names from {sorted(TEACHERS)}, got {unknown}")
    rows = []
    for i in range(problems):
        story = make_story(random.Random(f"story {seed} {i}"), moves=moves)
        for teacher in teachers:
            rng = random.Random(f"{teacher} {seed} {i}")
            rows.append(
                {
                    "question_id": f"zoo-{seed}-{i:05d}",
                    "prompt": story.question,
                    "teacher": teacher,
                    "completion": TEACHERS[teacher](story, rng),
                    "answer": str(story.answer),
                }
            )
    return rows


def make_questions(
    number: int, seed: int, *, moves: tuple[int, int] = (2, 3), exclude: set[str] | None = None
) -> list[dict[str, str]]:
    """Returns test questions: question_id, prompt, answer.

    Args:
        number: number of questions.
        seed: seed of the stories; they are drawn apart from the training stories of that seed.
        moves: least and greatest number of moves of a story.
        exclude: prompts to leave out, such as the training prompts.
    """
    seen = set(exclude or ())
    rows: list[dict[str, str]] = []
    i = 0
    while len(rows) < number:
        story = make_story(random.Random(f"test {seed} {i}"), moves=moves)
        i += 1
        if story.question in seen:
            continue
        seen.add(story.question)
        rows.append(
            {
                "question_id": f"zoo-test-{seed}-{len(rows):05d}",
                "prompt": story.question,
                "answer": str(story.answer),
            }
        )
    return rows
