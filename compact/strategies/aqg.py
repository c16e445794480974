"""AQG: new questions from a graph of quantities, with known answers and planted misconceptions.

A graph is a DAG: leaves are given numbers, every other node is the sum, difference or product of
two earlier ones. Four kinds of question are read from it:

- forward: the leaves are given, the last node is asked for;
- backward: the last node and all leaves but one are given, that leaf is asked for;
- branch: two nodes that are not on one path are compared;
- misconception: as forward; besides the right rationale there is one in which a step uses another
  operation (less for more, more for less, plus for times), and later steps continue from it.

Source: question generation from causal graphs of concepts (arXiv 2601.06098). Ours: arithmetic
graphs in plain words. The answer of every question is checked by solving the graph again. Ours too:
a writer may put the questions in other words, which are kept if they have the same numbers and
names and lead the writer to the known answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import rustworkx as rx
from torch import nn

from compact.data import Problem, Rationale, Text
from compact.options import check_number
from compact.strategies.base import Strategy, register_strategy
from compact.strategies.building import of_the_first, reads_gold
from compact.teachers.prompts import QUESTION, find_template
from compact.teachers.tasks import Task, Work, Writer, find_writer, work_off

if TYPE_CHECKING:
    from compact.config import CompactConfig
    from compact.weighting import Weigher

KINDS = ("forward", "backward", "branch", "misconception")
THINGS = ("red", "blue", "green", "yellow", "white", "black", "brown", "orange", "purple", "pink")
_OPERATIONS: dict[str, tuple[str, Callable[[int, int], int]]] = {
    "add": ("+", lambda a, b: a + b),
    "subtract": ("-", lambda a, b: a - b),
    "multiply": ("*", lambda a, b: a * b),
}
_CONFUSED = {"add": "subtract", "subtract": "add", "multiply": "add"}
_TRIES = 1000  # graphs that are drawn for a question
TEACHER, MISCONCEPTION = "aqg", "aqg-misconception"


@dataclass(frozen=True)
class Graph:
    """A DAG of quantities.

    Attributes:
        dag: nodes are names of quantities; an edge goes from a part to what is made of it.
        values: node -> number, for all nodes.
        rules: node -> (operation, first part, second part), for the nodes that are not leaves.
    """

    dag: rx.PyDiGraph[str, None]
    values: dict[int, int]
    rules: dict[int, tuple[str, int, int]]

    @property
    def leaves(self) -> list[int]:
        """The given nodes, in order."""
        return [n for n in self.dag.node_indices() if n not in self.rules]

    @property
    def last(self) -> int:
        """The node that depends on most others."""
        return max(self.rules, key=lambda n: (len(rx.ancestors(self.dag, n)), n))

    def solve(self, given: dict[int, int], wrong: dict[int, str] | None = None) -> dict[int, int]:
        """Returns all values from those of the leaves; `wrong` replaces operations of nodes."""
        values = dict(given)
        for node in rx.topological_sort(self.dag):
            if node in self.rules:
                operation, a, b = self.rules[node]
                operation = (wrong or {}).get(node, operation)
                values[node] = _OPERATIONS[operation][1](values[a], values[b])
        return values


def make_graph(rng: Random, leaves: int = 3, steps: int = 3) -> Graph:
    """Draws a graph whose values are in 1..999 and whose leaves are all used.

    Args:
        rng: random generator.
        leaves: number of given quantities, 2 to 5.
        steps: number of computed quantities, at least leaves / 2, at most 5.
    """
    while True:
        names = rng.sample(THINGS, leaves + steps)
        dag: rx.PyDiGraph[str, None] = rx.PyDiGraph()
        values = {dag.add_node(name): rng.randint(2, 12) for name in names[:leaves]}
        rules: dict[int, tuple[str, int, int]] = {}
        for name in names[leaves:]:
            nodes = list(values)
            a, b = rng.sample(nodes, 2)
            operation = rng.choice(list(_OPERATIONS))
            node = dag.add_node(name)
            rules[node] = (operation, a, b)
            for part in (a, b):
                dag.add_edge(part, node, None)
            values[node] = _OPERATIONS[operation][1](values[a], values[b])
        used = all(dag.out_degree(n) for n in list(values)[:leaves])
        if used and all(0 < value < 1000 for value in values.values()):
            return Graph(dag, values, rules)


def make_problem(kind: str, graph: Graph, question_id: str, rng: Random) -> Problem | None:
    """Returns a question of a kind, with its rationales; None if the graph has none of this kind.

    Raises:
        RuntimeError: the answer is not what solving the graph gives.
    """
    name = graph.dag.get_node_data
    given = {n: graph.values[n] for n in graph.leaves}
    last, told, line = graph.last, _told(graph), _line
    needed = [n for n in rx.topological_sort(graph.dag) if n in graph.rules]
    needed = [n for n in needed if n == last or n in rx.ancestors(graph.dag, last)]
    wrong: str | None = None
    if kind in ("forward", "misconception"):
        facts = [f"There are {given[n]} {name(n)} beads." for n in graph.leaves]
        question = f"How many {name(last)} beads are there?"
        lines = [line(graph, n, graph.values) for n in needed]
        answer = graph.values[last]
        if kind == "misconception":
            node = rng.choice(needed)
            swapped = {node: _CONFUSED[graph.rules[node][0]]}
            values = graph.solve(given, swapped)
            if values[last] == answer or min(values.values()) < 0:
                return None
            wrong = _text([line(graph, n, values, swapped) for n in needed], values[last])
    elif kind == "backward":
        solved = _backward(graph, last)
        if solved is None:
            return None
        hidden, lines = solved
        facts = [f"There are {given[n]} {name(n)} beads." for n in graph.leaves if n != hidden]
        facts.append(f"There are {graph.values[last]} {name(last)} beads.")
        question, answer = f"How many {name(hidden)} beads are there?", given[hidden]
        fits = [
            v
            for v in range(1, 1000)
            if graph.solve(given | {hidden: v})[last] == graph.values[last]
        ]
        if fits != [answer]:
            raise RuntimeError(f"{question_id}: solving the graph gives {fits}, expected {answer}")
    elif kind == "branch":
        pairs = [
            (a, b)
            for a in graph.rules
            for b in graph.rules
            if graph.values[a] > graph.values[b]
            and a not in rx.ancestors(graph.dag, b)
            and b not in rx.ancestors(graph.dag, a)
        ]
        if not pairs:
            return None
        a, b = rng.choice(pairs)
        facts = [f"There are {given[n]} {name(n)} beads." for n in graph.leaves]
        question = f"How many more {name(a)} beads than {name(b)} beads are there?"
        both = {a, b} | rx.ancestors(graph.dag, a) | rx.ancestors(graph.dag, b)
        order = [n for n in rx.topological_sort(graph.dag) if n in graph.rules and n in both]
        x, y = graph.values[a], graph.values[b]
        answer = x - y
        lines = [line(graph, n, graph.values) for n in order]
        lines.append(f"The difference is {x} - {y} = {answer}.")
    else:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if graph.solve(given) != graph.values:
        raise RuntimeError(f"{question_id}: solving the graph gives other values")
    rationales = [Rationale(TEACHER, _text(lines, answer), 0)]
    if wrong is not None:
        rationales.append(Rationale(MISCONCEPTION, wrong, 0))
    prompt = " ".join([*facts, *told, question])
    return Problem(question_id, prompt, str(answer), tuple(rationales))


def _told(graph: Graph) -> list[str]:
    """Returns the sentences of the rules."""
    name = graph.dag.get_node_data
    sentences = {
        "add": "There are as many {n} beads as {a} and {b} beads together.",
        "subtract": "The number of {n} beads is that of {a} beads minus that of {b} beads.",
        "multiply": "The number of {n} beads is that of {a} beads times that of {b} beads.",
    }
    return [
        sentences[operation].format(n=name(n), a=name(a), b=name(b))
        for n, (operation, a, b) in graph.rules.items()
    ]


def _line(
    graph: Graph, node: int, values: dict[int, int], wrong: dict[int, str] | None = None
) -> str:
    operation, a, b = graph.rules[node]
    sign = _OPERATIONS[(wrong or {}).get(node, operation)][0]
    name = graph.dag.get_node_data(node)
    return f"There are {values[a]} {sign} {values[b]} = {values[node]} {name} beads."


def _text(lines: Sequence[str], answer: int) -> str:
    return "\n".join([*lines, f"The answer is {answer}"])


def _backward(graph: Graph, last: int) -> tuple[int, list[str]] | None:
    """Returns a leaf that reaches `last` on one path only, and the lines that solve for it."""
    name = graph.dag.get_node_data
    for leaf in graph.leaves:
        paths = rx.all_simple_paths(graph.dag, leaf, last)
        if len(paths) != 1:
            continue
        path = list(paths[0])
        side = [n for n in rx.topological_sort(graph.dag) if n in graph.rules and n not in path]
        side = [n for n in side if n in rx.ancestors(graph.dag, last)]
        lines = [_line(graph, n, graph.values) for n in side]
        for node, before in zip(path[:0:-1], path[-2::-1], strict=True):
            operation, a, b = graph.rules[node]
            total, other = graph.values[node], graph.values[b if before == a else a]
            found = graph.values[before]
            if operation == "multiply":
                equation = f"{total} / {other} = {found}"
            elif operation == "add":
                equation = f"{total} - {other} = {found}"
            elif before == a:
                equation = f"{total} + {other} = {found}"
            else:
                equation = f"{other} - {total} = {found}"
            lines.append(f"There are {equation} {name(before)} beads.")
        return leaf, lines
    return None


def make_problems(
    count: int, seed: int, kinds: Sequence[str], leaves: int, steps: int
) -> list[Problem]:
    """Returns `count` problems whose kinds alternate; the same for the same arguments."""
    found: list[Problem] = []
    for i in range(count):
        rng, kind = Random(f"aqg {seed} {i}"), kinds[i % len(kinds)]
        drawn = (
            make_problem(kind, make_graph(rng, leaves, steps), f"aqg-{seed}-{i:05d}", rng)
            for _ in range(_TRIES)
        )
        problem = next((p for p in drawn if p is not None), None)
        if problem is None:
            raise RuntimeError(
                f"aqg: no graph of {leaves} leaves and {steps} steps has a {kind} question"
            )
        found.append(problem)
    return found


WORDING = """Write this question again in other words, as a short text that reads naturally. Keep
every number as digits, keep the names of the things ({names}), and add no fact. Write only the
question.

{question}"""


def worded(problem: Problem) -> Work[Problem]:
    """Returns a problem in a writer's words, or as it is if these lose a fact.

    The new wording must hold the same numbers and names, and the writer, who does not see the known
    answer, must get to it from the new wording.
    """
    question, right = str(problem.prompt), reads_gold(problem)
    names, numbers = _names(question), _numbers(question)

    def read(text: str) -> str | None:
        text = text.strip().strip('"')
        return text if _names(text) == names and _numbers(text) == numbers else None

    prompt = WORDING.format(names=", ".join(f"{name} beads" for name in names), question=question)
    (wording,) = yield [Task(prompt, read)]
    if wording is None:
        return problem
    (solved,) = yield [Task(find_template("step-by-step").replace(QUESTION, wording), right)]
    return problem if solved is None else replace(problem, prompt=wording)


def _names(text: str) -> list[str]:
    words = set(re.findall(r"[a-z]+", text.lower()))
    return [name for name in THINGS if name in words]


def _numbers(text: str) -> list[str]:
    return sorted(re.findall(r"\d+", text))


@register_strategy("aqg")
class QuestionGraphs(Strategy):
    """Adds questions from graphs of quantities, with known answers and planted misconceptions."""

    def __init__(
        self,
        count: int = 100,
        kinds: Sequence[str] = KINDS,
        leaves: int = 3,
        steps: int = 3,
        writer: str | None = None,
        budget: float | None = None,
    ) -> None:
        """Sets up the questions.

        Args:
            count: number of questions to add.
            kinds: kinds of question, in turn.
            leaves: given quantities of a graph, 2 to 5.
            steps: computed quantities of a graph, 1 to 5.
            writer: who puts the questions in other words: FILE.yaml:TEACHER, a teacher of
                `compact collect`, or MODULE:FUNCTION, a function from requests to as many texts.
                None: the questions keep the words of this file.
            budget: most that the teacher's store may cost in all.

        Raises:
            ValueError: a value is not allowed, or there is no such writer.
            OSError: the file of teachers cannot be read.
        """
        for name, value, low, high in (
            ("count", count, 1, None),
            ("leaves", leaves, 2, 5),
            ("steps", steps, 1, 5),
        ):
            check_number(f"{name} of aqg", value, least=low, most=high, whole=True)
        known = isinstance(kinds, list | tuple) and all(kind in KINDS for kind in kinds)
        if not known or not kinds:
            raise ValueError(f"kinds of aqg must be among {', '.join(KINDS)}, got {kinds!r}")
        if 2 * steps < leaves:
            least = -(-leaves // 2)
            raise ValueError(
                f"steps of aqg must be at least {least} to use {leaves} leaves, got {steps}"
            )
        if "branch" in kinds and steps < 2:
            raise ValueError(f"steps of aqg must be at least 2 for branch questions, got {steps}")
        if budget is not None:
            check_number("budget of aqg", budget, least=0)
            if writer is None:
                raise ValueError(f"budget of aqg must stand with a writer, got {budget!r}")
        self.writer = None if writer is None else find_writer(writer, budget=budget)
        self.count, self.kinds, self.leaves, self.steps = count, tuple(kinds), leaves, steps
        self.seed = 0
        self._log: dict[str, float] = {}

    def check(self, weigher: Weigher, args: CompactConfig) -> None:
        """Keeps the seed; refuses a single teacher, which has no rationale of these questions."""
        if weigher.teacher is not None:
            raise ValueError(
                f"preset must not be {args.preset} with strategy aqg, whose questions have "
                f"rationales of the teachers {TEACHER} and {MISCONCEPTION}"
            )
        self.seed = args.seed

    def prepare(
        self, problems: Sequence[Problem], model: nn.Module, processing_class: Any
    ) -> Sequence[Problem]:
        """Returns the problems and the new ones."""
        new = make_problems(self.count, self.seed, self.kinds, self.leaves, self.steps)
        self._log = {"questions": float(len(new))}
        for kind in self.kinds:
            self._log[f"kinds/{kind}"] = float(
                sum(self.kinds[i % len(self.kinds)] == kind for i in range(len(new)))
            )
        if self.writer is not None:
            old, prompts = new, of_the_first(partial(self._worded, new, self.writer))
            new = [replace(p, prompt=prompt) for p, prompt in zip(old, prompts, strict=True)]
            told = sum(a.prompt != b.prompt for a, b in zip(old, new, strict=True))
            self._log |= {"worded": float(told), "worded but wrong": float(len(new) - told)}
        return [*problems, *new]

    def _worded(self, problems: Sequence[Problem], writer: Writer) -> list[Text]:
        """Returns the prompt of each problem in the writer's words."""
        found: dict[str, Problem] = {}
        for start in range(0, len(problems), writer.at_once):
            some = problems[start : start + writer.at_once]
            found |= work_off({p.question_id: worded(p) for p in some}, writer.write)
        return [found[p.question_id].prompt for p in problems]

    def take_log(self) -> dict[str, float]:
        """Returns the number of questions of each kind, once."""
        found, self._log = self._log, {}
        return found
