"""Step graphs: native assembly against plain Python, ties, mainstream, saving and drawing."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import rustworkx as rx
from hypothesis import given, settings

from benchmarks.graph import classes_of, loops, texts
from compact.commands.cli import main
from compact.data import load_problems
from compact.evaluation.score import score_problems
from compact.graphs import _graph, plain
from compact.graphs.drawing import MOST_NODES, draw_graph
from compact.graphs.step_graphs import (
    Steps,
    as_rustworkx,
    build_graphs,
    describe_steps,
    load_graph,
    save_graph,
)
from compact.lab.zoo import make_rows
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.metrics.step_graph import consensus
from compact.student import Student
from compact.weighting import make_weigher

_STEP = st.sampled_from(
    (
        "3 + 4 = 7",
        "4 + 3 = 7",
        "3 + 4 = 8",
        "7 - 2 = 5",
        "7",
        "7 and 5",
        "7, 5, 2 and 3",
        "7, 5, 2, 3 and 4",
    )
    + ("hence", "so it is", "we add them")
)
_PROBLEM = st.lists(st.lists(_STEP, min_size=1, max_size=6), min_size=1, max_size=6)
_PROBLEMS = st.lists(_PROBLEM, min_size=1, max_size=3)
# Directions at 0, 30, .. 330 degrees: many pairs are equally far apart, some beyond 0.8.
_ANGLES = st.integers(0, 11)


def scores(problems: list[list[list[str]]], angles: list[int] | None = None) -> np.ndarray:
    """[R] consensus of all rationales."""
    steps = described(problems, angles)
    return consensus(steps, build_graphs(steps))


def described(problems: list[list[list[str]]], angles: list[int] | None) -> Steps:
    """Steps as arrays, with states where angles are given, one a step."""
    if angles is None:
        return describe_steps(problems, None)
    turn = np.array(angles) * np.pi / 6
    return describe_steps(problems, np.stack([np.cos(turn), np.sin(turn)], axis=1))


def draw_angles(data: st.DataObject, problems: list[list[list[str]]]) -> list[int] | None:
    """An angle a step, or None for steps without states."""
    count = sum(len(rationale) for problem in problems for rationale in problem)
    return data.draw(st.none() | st.lists(_ANGLES, min_size=count, max_size=count))


@settings(max_examples=150)
@given(_PROBLEMS, st.data())
def test_native_equals_plain_python(problems, data) -> None:
    """Matching, classes, cycle cutting, mainstream and consensus, with and without states."""
    angles = draw_angles(data, problems)
    steps = described(problems, angles)
    np.testing.assert_allclose(consensus(steps, build_graphs(steps)), loops(steps), atol=1e-12)


def fields(raw: dict[str, np.ndarray]) -> dict[str, list]:
    """What `assemble` returns, with the edges of each problem in order."""
    edges = np.column_stack([raw["edges"], raw["edge_count"]])
    parts = np.split(edges, raw["edge_offsets"][1:-1])
    lists = {name: value.tolist() for name, value in raw.items()}
    return lists | {"edges": [sorted(part.tolist()) for part in parts], "edge_count": []}


@settings(max_examples=150)
@given(_PROBLEMS, st.data())
def test_without_native_libraries_the_graphs_are_the_same(problems, data) -> None:
    """Every array, except for the order of the edges of a problem."""
    steps = described(problems, draw_angles(data, problems))
    assert fields(plain.assemble(*steps, 0.8)) == fields(_graph.assemble(*steps, 0.8))


@pytest.mark.parametrize("assemble", [_graph.assemble, plain.assemble], ids=["native", "plain"])
def test_an_edge_counts_once_a_rationale(assemble) -> None:
    """a and b are in the first rationale twice, as the others join both; a -> b counts 3, not 4."""
    a, b, c = "3 + 4 = 7", "9 * 9 = 81", "5 - 2 = 3"
    steps = describe_steps([[[a, b, c, a, b], [a, b], [c, a, b]]], None)
    found = assemble(*steps, 0.8)
    assert found["class_members"].tolist() == [3, 3, 2]
    counts = dict(zip(map(tuple, found["edges"].tolist()), found["edge_count"], strict=True))
    assert counts == {(0, 1): 3, (2, 0): 2}


def test_native_equals_plain_python_on_the_benchmark() -> None:
    """The problems that are timed: 8 rationales of 12 steps."""
    steps = describe_steps(texts(5, 8, 12, seed=1), None)
    np.testing.assert_allclose(consensus(steps, build_graphs(steps)), loops(steps), atol=1e-12)


@settings(max_examples=100)
@given(_PROBLEM, st.data())
def test_order_of_rationales_changes_nothing(problem, data) -> None:
    """The consensus of a rationale does not depend on the order of rationales, to the last bit."""
    angles = draw_angles(data, [problem])
    order = data.draw(st.permutations(range(len(problem))))
    if angles is None:
        moved = None
    else:
        rest = iter(angles)
        parts = [[next(rest) for _ in rationale] for rationale in problem]
        moved = [angle for k in order for angle in parts[k]]
    assert scores([[problem[k] for k in order]], moved).tolist() == (
        scores([problem], angles)[list(order)].tolist()
    )


@settings(max_examples=100)
@given(
    st.lists(st.lists(st.sampled_from((0, 3, 6)), min_size=1, max_size=4), min_size=2, max_size=4),
    st.randoms(use_true_random=False),
)
def test_states_break_ties_where_texts_are_the_same(turns, rng) -> None:
    """All steps have the same text; only the states determine which crossing match is kept."""
    order = list(range(len(turns)))
    rng.shuffle(order)

    def found(rationales: list[list[int]]) -> list[float]:
        texts = [["hence"] * len(mine) for mine in rationales]
        return scores([texts], [angle for mine in rationales for angle in mine]).tolist()

    before = found(turns)
    assert found([turns[k] for k in order]) == [before[k] for k in order]


@given(_PROBLEM, st.integers(0, 5))
def test_copies_agree(problem, which) -> None:
    """A rationale and its copy get the same consensus, above 0."""
    copied = scores([[*problem, problem[which % len(problem)]]])
    assert copied[-1] == copied[which % len(problem)]
    assert copied[-1] >= 2 / (len(problem) + 1)


def test_support_and_mainstream_by_hand() -> None:
    """Two teachers agree in three steps, the third errs from the second step on."""
    right = ["3 + 4 = 7", "7 - 2 = 5", "5 * 2 = 10"]
    wrong = ["3 + 4 = 7", "7 - 2 = 6", "6 * 2 = 12"]
    found = scores([[right, right, wrong]])
    np.testing.assert_allclose(found, [7 / 9 + 0.5, 7 / 9 + 0.5, 5 / 9])


def test_ties_leave_nobody_out() -> None:
    """Two teachers without common steps: their paths have equal support, so both are mainstream."""
    np.testing.assert_allclose(scores([[["3 + 4 = 7"], ["2 * 5 = 10"]]]), [1.0, 1.0])


def test_a_cycle_loses_its_rarer_direction() -> None:
    """a b twice and b a once: a -> b stays. Crossing matches are joined by those with one step."""
    a, b = "3 + 4 = 7", "9 * 9 = 81"
    steps = describe_steps([[[a, b], [a, b], [b, a], [a], [b]]], None)
    graphs = build_graphs(steps)
    (edge,) = graphs.edges.tolist()
    assert edge == graphs.step_class[:2].tolist()
    assert graphs.edge_count.tolist() == [2]


def test_a_cycle_without_rarer_direction_loses_both() -> None:
    """a b once and b a once: neither edge is kept."""
    a, b = "3 + 4 = 7", "9 * 9 = 81"
    graphs = build_graphs(describe_steps([[[a, b], [b, a], [a], [b]]], None))
    assert len(graphs.edges) == 0
    assert graphs.mainstream.tolist() == [True, True]


def test_matches_keep_the_order_of_steps() -> None:
    """Of two crossing matches only one is kept."""
    a, b = "3 + 4 = 7", "9 * 9 = 81"
    graphs = build_graphs(describe_steps([[[a, b], [b, a]]], None))
    assert len(graphs.matches) == 1


def test_plain_classes_are_joined_over_teachers_only() -> None:
    """Two equal steps of one teacher stay apart where no other teacher links them."""
    graphs = build_graphs(describe_steps([[["3 + 4 = 7", "3 + 4 = 7"]]], None))
    assert len(graphs.support) == 2
    assert classes_of([[]]) == {}


def test_numbers_match_from_four_in_five_on() -> None:
    """The threshold itself is a match."""
    found = [
        build_graphs(describe_steps([[["7, 5, 2, 3 and 4"], [other]]], None)).support.tolist()
        for other in ("7, 5, 2 and 3", "7, 5 and 2")
    ]
    assert found == [[1.0], [0.5, 0.5]]


def test_a_match_is_the_best_of_both() -> None:
    """A step at 30 degrees does not match a step at 0 that has a better match."""
    words = [["hence"] * 3, ["hence"] * 2]
    steps = described([words], [1, 6, 0, 0, 6])
    assert build_graphs(steps).support[build_graphs(steps).step_class[0]] == 0.5
    np.testing.assert_allclose(consensus(steps, build_graphs(steps)), loops(steps))


def test_states_decide_between_words() -> None:
    """Steps without mathematics match from a cosine of 0.8 on."""
    near, far = [[1.0, 0.0], [0.9, 0.1]], [[1.0, 0.0], [0.5, 0.6]]
    found = [
        build_graphs(describe_steps([[["hence"], ["so it is"]]], np.array(state))).support
        for state in (near, far)
    ]
    assert found[0].tolist() == [1.0]
    assert found[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_offsets": np.array([0, 1])}, "step_offsets must rise from 0 to 2"),
        ({"problem_offsets": np.array([0, 3])}, "problem_offsets must rise from 0 to 2"),
        ({"item_offsets": np.array([0, 0])}, r"item_offsets must have S \+ 1 = 3 entries, got 2"),
        ({"state": np.zeros((1, 0), np.float32)}, r"state must have shape \[S, H\] with S = 2"),
    ],
)
def test_broken_arrays_are_refused(change: dict[str, np.ndarray], message: str) -> None:
    """The native code checks its arrays."""
    steps = describe_steps([[["hence"], ["so"]]], None)._replace(**change)
    with pytest.raises(ValueError, match=message):
        _graph.assemble(*steps, 0.8)


def test_states_that_are_not_finite_are_refused() -> None:
    """States of a diverged student, which are not finite, raise an error."""
    with pytest.raises(ValueError, match="hidden states must be finite"):
        describe_steps([[["hence"]]], np.array([[np.nan, 1.0]], np.float32))


def example() -> rx.PyDiGraph:
    """The second of two problems: three teachers, one of whom miscounts."""
    right = ["Mia starts with 3 apples", "3 + 4 = 7", "7 - 2 = 5"]
    wrong = ["Mia starts with 3 apples", "3 + 4 = 8", "8 - 2 = 6"]
    problems = [[["9 * 9 = 81"]], [right, right, wrong]]
    graphs = build_graphs(describe_steps(problems, None))
    return as_rustworkx(graphs, 1, problems[1], ["ada", "bob", "cy"])


def test_graph_of_a_problem() -> None:
    """Nodes say who, how many, whether the arithmetic holds and whether they are mainstream."""
    nodes = {node["text"]: node for node in example().nodes()}
    assert set(nodes) == {
        *("Mia starts with 3 apples", "3 + 4 = 7", "7 - 2 = 5", "3 + 4 = 8", "8 - 2 = 6")
    }
    assert nodes["Mia starts with 3 apples"]["teachers"] == "ada, bob, cy"
    assert nodes["7 - 2 = 5"] == {
        "text": "7 - 2 = 5",
        "teachers": "ada, bob",
        "support": "0.667",
        "arithmetic": "holds",
        "mainstream": "true",
    }
    assert nodes["3 + 4 = 8"]["arithmetic"] == "fails"
    assert nodes["8 - 2 = 6"]["mainstream"] == "false"


def test_other_arithmetic_is_not_checked() -> None:
    """As by the judge."""
    steps = [["5 + 8 = 1 in mod 12 arithmetic."], ["5 + 8 = 1"]]
    graph = as_rustworkx(build_graphs(describe_steps([steps], None)), 0, steps[:1], ["ada"])
    assert graph[0]["arithmetic"] == "none"


def test_a_graph_too_large_to_draw_is_saved_again(tmp_path: Path) -> None:
    """The limit is that of the picture."""
    steps = [[f"{i} + 0 = {i}" for i in range(MOST_NODES + 1)]]
    graph = as_rustworkx(build_graphs(describe_steps([steps], None)), 0, steps, ["ada"])
    path = tmp_path / "graph.json"
    save_graph(graph, path)
    save_graph(graph, path)
    assert len(load_graph(path)) == MOST_NODES + 1
    with pytest.raises(ValueError, match="has 2001 nodes, at most 2000 can be drawn"):
        draw_graph(graph, tmp_path / "graph.png")
    assert not (tmp_path / "graph.png").exists()


def test_saved_graph_is_loaded_and_drawn(tmp_path: Path) -> None:
    """A saved graph is loaded unchanged and can be drawn."""
    graph, path = example(), tmp_path / "graph.json"
    save_graph(graph, path)
    loaded = load_graph(path)
    assert loaded.nodes() == graph.nodes()
    assert sorted(loaded.weighted_edge_list(), key=str) == (
        sorted(graph.weighted_edge_list(), key=str)
    )
    draw_graph(loaded, tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    assert main(["graph", str(path), "--out", str(tmp_path / "graph.svg")]) == 0
    assert "<svg" in (tmp_path / "graph.svg").read_text()


def test_score_saves_the_graphs(tmp_path: Path) -> None:
    """`compact score --graphs` writes one file per problem, for any question_id."""
    tokenizer = build_tokenizer()
    student = Student.of(build_model(tokenizer, seed=0, layers=1).eval(), tokenizer)
    rows = make_rows(("good", "wrong-step"), 2, seed=1)
    rows = [row | {"question_id": f"a/b {row['question_id']}"} for row in rows]
    weigher = make_weigher("uniform")
    score_problems(student, tokenizer, load_problems(rows), weigher, graphs=tmp_path)
    graphs = [load_graph(path) for path in sorted(tmp_path.iterdir())]
    assert len(graphs) == 2
    assert {"good", "wrong-step", "good, wrong-step"} >= {
        node["teachers"] for graph in graphs for node in graph.nodes()
    }


_OTHER_GRAPHS = [
    rx.node_link_json(rx.generators.directed_path_graph(2)),
    '{"directed": false, "multigraph": false, "attrs": null, "nodes": [], "links": []}',
]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"nodes": 3}', "\x00", *_OTHER_GRAPHS])
def test_a_file_that_is_no_graph(tmp_path: Path, text: str) -> None:
    """The error names the file."""
    path = tmp_path / "graph.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"graph\.json: expected a saved graph"):
        load_graph(path)
