"""Files that are read: a right result, or one line that names file and place."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compact.commands.recipe import read_settings
from compact.data import load_problems, load_questions
from compact.data.importers import import_files
from compact.evaluation.arms import parse_arm
from compact.evaluation.forgetting import read_texts
from compact.files import MAX_DEPTH, check_shape, parse_json, parse_yaml
from compact.graphs.step_graphs import load_graph
from compact.passes.types import EncodedProblem  # noqa: F401  (the package must import)
from compact.report.run import read_run
from compact.student.names import base_name
from compact.text.equations import equations, numbers
from compact.text.steps import split_steps
from compact.trainer.checkpoints import damage
from compact.trainer.saving import read_state

# What any JSON file may turn out to be.
BAD_JSON = {
    "empty": b"",
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "text": b'"x"',
    "true": b"true",
    "object": b"{}",
    "cut": b'{"a": ',
    "cut text": b'{"a": "b',
    "not UTF-8": b'{"a": "\xff"}',
    "NUL": b"\x00",
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "closed deep": b"[" * 200 + b"]" * 200,
    "long number": b'{"a": ' + b"9" * 5000 + b"}",
    "key twice": b'{"a": 1, "a": 2}',
    "surrogate": b'{"a": "\\ud800"}',
    "garbage after": b"{} {}",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "binary": bytes(range(256)),
}


def of_a_run(name: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        run = path.parent / "run"
        run.mkdir()
        good = {"arms": [], "log_history": [], "student": "s", "status": "complete"}
        (run / "compare.json").write_text(json.dumps(good))
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(path.read_bytes())
        return read_run(run)

    return read


def checkpoint(name: str) -> Callable[[Path], object]:
    def read(path: Path) -> object:
        folder = path.parent / "checkpoint-1"
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"global_step": 1}')
        (folder / "compact_state.json").write_text('{"weigher": {}, "gains": {}}')
        (folder / name).write_bytes(path.read_bytes())
        return read_state(folder, "robust", None)

    return read


def adapter(path: Path) -> object:
    folder = path.parent / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes(path.read_bytes())
    return base_name(str(folder))


READERS: dict[str, Callable[[Path], object]] = {
    "rationales": load_problems,
    "questions": load_questions,
    "import": lambda path: import_files([(None, path)]),
    "gold": lambda path: import_files([(None, path)], path),
    "graph": load_graph,
    "run.json": of_a_run("run.json"),
    "compare.json": of_a_run("compare.json"),
    "trainer_state.json of a run": of_a_run("trainer_state.json"),
    "compact_state.json": checkpoint("compact_state.json"),
    "trainer_state.json": checkpoint("trainer_state.json"),
    "adapter_config.json": adapter,
}
# An empty object says nothing wrong in these files.
FINE = {("run.json", "object")}


@pytest.mark.parametrize("bad", BAD_JSON)
@pytest.mark.parametrize("reader", READERS)
def test_bad_json(tmp_path: Path, reader: str, bad: str) -> None:
    """One line that names a file, within two seconds."""
    path = tmp_path / "bad.json"
    path.write_bytes(BAD_JSON[bad])
    start = time.thread_time()
    if (reader, bad) in FINE:
        READERS[reader](path)
    else:
        with pytest.raises((ValueError, TypeError, OSError)) as error:
            READERS[reader](path)
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert time.thread_time() - start < 2


@pytest.mark.parametrize("bad", sorted(set(BAD_JSON) - {"garbage after"}))
def test_a_bad_manifest_is_damage(tmp_path: Path, bad: str) -> None:
    (tmp_path / "manifest.json").write_bytes(BAD_JSON[bad])
    assert "manifest.json cannot be read" in str(damage(tmp_path))


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
@pytest.mark.parametrize("reader", ["rationales", "questions", "import", "graph", "texts"])
def test_no_plain_file(tmp_path: Path, reader: str, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        import os

        os.mkfifo(path)
    read: Any = READERS | {"texts": read_texts}
    with pytest.raises(OSError, match="x: (no such file|expected a file, got a)"):
        read[reader](path)


GOOD = {"question_id": "q", "prompt": "1 + 1?", "teacher": "t", "completion": "2", "answer": "2"}
ROWS = {
    "id is a list": {"question_id": []},
    "id is true": {"question_id": True},
    "id is empty": {"question_id": " "},
    "id is null": {"question_id": None},
    "prompt is a number": {"prompt": 3},
    "prompt is empty": {"prompt": ""},
    "prompt has no message": {"prompt": []},
    "message is text": {"prompt": ["x"]},
    "message without role": {"prompt": [{"content": "x"}]},
    "message of parts": {"prompt": [{"role": "user", "content": [{"text": "x"}]}]},
    "tool calls": {"completion": [{"role": "assistant", "content": "2", "tool_calls": [{}]}]},
    "reasoning is a list": {
        "completion": [{"role": "assistant", "content": "2", "reasoning_content": ["x"]}]
    },
    "ends with the user": {"completion": [{"role": "user", "content": "x"}]},
    "completion is an object": {"completion": {}},
    "completion is null": {"completion": None},
    "teacher is a number": {"teacher": 3},
    "teacher is empty": {"teacher": ""},
    "answer is a list": {"answer": ["2"]},
    "answer is true": {"answer": True},
    "answer is not finite": {"answer": float("nan")},
    "answer is infinite": {"answer": float("inf")},
    "answer_type is unknown": {"answer_type": "numbr"},
    "answer_type is a number": {"answer_type": 3},
    "answer is not of its type": {"answer_type": "date"},
    "surrogate in a prompt": {"prompt": "\ud800"},
    "surrogate in a completion": {"completion": "x\udfff"},
    "surrogate in a message": {"completion": [{"role": "assistant", "content": "\ud800"}]},
}


@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "rows"])
@pytest.mark.parametrize("change", ROWS)
def test_bad_row(tmp_path: Path, change: str, in_memory: bool) -> None:
    row = GOOD | ROWS[change]
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(GOOD | {"question_id": "p"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises((ValueError, TypeError)) as error:
        load_problems([GOOD | {"question_id": "p"}, row] if in_memory else path)
    assert str(error.value).startswith("list row 1:" if in_memory else f"{path}:2:")


def test_numbers_as_id_and_answer() -> None:
    (problem,) = load_problems([GOOD | {"question_id": 7, "answer": 2.5}])
    assert (problem.question_id, problem.answer) == ("7", "2.5")


ARRAYS = {
    "garbage after the array": ("[{0}] x", "expected nothing after the array"),
    "two arrays": ("[{0}][{0}]", "expected nothing after the array"),
    "open": ("[{0}", "expected ',' or ']'"),
    "open after a comma": ("[{0},", "expected"),
    "key twice": ('[{0},{{"question_id": "a", "question_id": "b"}}]', "row 2: .*twice"),
    "a number": ("[{0}, 3]", "row 2: expected a JSON object, got int"),
    "a list": ("[{0}, []]", "row 2: expected a JSON object, got list"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_bad_array(tmp_path: Path, name: str) -> None:
    text, words = ARRAYS[name]
    path = tmp_path / "x.json"
    path.write_text(text.format(json.dumps(GOOD)))
    with pytest.raises(ValueError, match=f"x.json:1: .*{words}|x.json:1: {words}"):
        import_files([(None, path)])


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True)
)
YAML = {
    "bomb": BOMB,
    "merge": "a: &x {b: 1}\nc:\n  <<: *x\n",
    "deep": "a: " + "[" * 3000,
    "deep closed": "a: " + "[" * 200 + "]" * 200,
    "list": "- a\n",
    "text": "hello",
    "number": "3",
    "tabs": "a:\n\t- b",
    "not YAML": "a: [b",
    "tag": "model: !!python/object/apply:os.system [id]",
    "date": "seed: 2020-99-99",
    "long number": "seed: " + "9" * 5000,
    "large": "a: " + "x" * 300_000,
    "key twice": "seed: 1\nseed: 2\n",
    "two documents": "seed: 1\n---\nseed: 2\n",
    "NUL": "model: a\0b",
    "list as key": "? [a]\n: b\n",
}


@pytest.mark.parametrize("name", YAML)
def test_bad_yaml(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(YAML[name])
    start = time.thread_time()
    with pytest.raises(ValueError) as error:
        read_settings(path, [])
    assert "recipe.yaml" in str(error.value) and "\n" not in str(error.value)
    assert time.thread_time() - start < 2


@pytest.mark.parametrize("arm", ["robust,tau=&a [*a]", "robust,tau=[", "robust,tau=.inf", "x,", ""])
def test_bad_arm(arm: str) -> None:
    with pytest.raises(ValueError):
        parse_arm(arm)


SETTINGS = [
    *("lora_dropout=-0.5", "lora_dropout=1.5", "lora_r=0", "lora_r=-1", "lora_alpha=0"),
    *("weight_decay=-1", "max_grad_norm=-1", "save_steps=0", "save_steps=-3", "eval_steps=0"),
    *("logging_steps=-1", "logging_steps=0", "overrides={tau: .inf}", "overrides={tau: .nan}"),
    *("overrides={beta: 3}", "overrides=[]", "optim_args=momentum=1", "optim_args=x"),
    *("load_best_model_at_end=true", "output_dir=", "output_dir=' '", "learning_rate=-1"),
    *("learning_rate=.inf", "learning_rate=.nan", "num_train_epochs=.inf", "warmup_steps=-1"),
    *("adam_beta1=1.5", "adam_beta2=-0.1", "adam_epsilon=-1", "seed=-1", "seed=99999999999"),
    *("max_steps=-5", "save_total_limit=0", "max_length=1", "leaf_every=0", "leaf_budget=0"),
    *("leaf_budget=-1", "filter_eps=1", "filter_eps=-1", "layout=x", "head_grad=x"),
    *("on_nonfinite=x", "label_smoothing_factor=0.1", "auto_find_batch_size=true", "model="),
    *("data=", "eval_data=", "lora_target_modules=[]", "lora_target_modules=['']"),
    *("max_problems=0", "dtype=x", "per_device_train_batch_size=0", "eval_strategy=sometimes"),
    *("per_device_eval_batch_size=-1", "gradient_accumulation_steps=0", "model_init_kwargs=3"),
    *("strategy_options=3", "learning_rate=fast", "bf16=maybe", "seed=1.5", "no_such_key=1"),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_bad_setting(setting: str) -> None:
    """Refused with the name of the setting, by the settings or by the weigher."""
    from compact.weighting import make_weigher

    key, _, value = setting.partition("=")
    with pytest.raises((ValueError, TypeError)) as error:
        _, config = read_settings(None, [f"--{key}={value}", "--report_to=none"])
        make_weigher(config.preset, **(config.overrides or {}))
    assert key in str(error.value) or "tau" in str(error.value) or "beta" in str(error.value)
    assert "\n" not in str(error.value)


def node(**change: Any) -> dict[str, Any]:
    data = {"text": "a", "teachers": "t", "support": "1.0", "arithmetic": "none"}
    return {"id": 0, "data": data | {"mainstream": "true"} | change}


GRAPHS = {
    "support 1e300": [node(support="1e300")],
    "support nan": [node(support="nan")],
    "support 0": [node(support="0")],
    "support -1": [node(support="-1")],
    "support x": [node(support="x")],
    "support is a number": [node(support=1.0)],
    "no nodes": [],
    "text is a list": [node(text=[])],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_bad_graph(tmp_path: Path, name: str) -> None:
    path = tmp_path / "g.json"
    text = {"directed": True, "multigraph": True, "attrs": None, "nodes": GRAPHS[name], "links": []}
    path.write_text(json.dumps(text))
    with pytest.raises(ValueError, match="g.json: expected a saved graph"):
        load_graph(path)


@pytest.mark.parametrize(
    "value,shape,words",
    [
        ({"a": True}, {"a": int}, "expected a to be a whole number, got true"),
        ({"a": [1, "x"]}, {"a": [int]}, r'expected a\[1\] to be a whole number, got "x"'),
        ({}, {"a": int}, "expected the key 'a', found none"),
        ({"b": {"c": {}}}, {"b": {str: [int]}}, "expected b.c to be a list, got a JSON object"),
        ([], {"a?": int}, "expected a JSON object, got a list"),
        ({"a": None}, {"a": (int, str)}, "expected a to be a whole number or text, got null"),
    ],
)
def test_shapes(value: Any, shape: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_shape(value, shape, "file")


def test_depth() -> None:
    """The limit itself is fine, and brackets in text are no nesting."""
    parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")
    parse_json(json.dumps("[" * 1000), "x")
    parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x")


PATTERNS = [
    *("=", "1=", "1+1=2 ", "(", "$x^2$. A", "$x^2$\n", "\\(a ", "\\begin{a}", "$$", ".", "?", "!"),
    *(" ", "\t", "\n", "\n ", ", so ", "step 1 ", "Mr. ", "x\n.\n", ".\n", "\u2028", "2x", "1,"),
]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("read", [split_steps, equations.__wrapped__, numbers.__wrapped__])
def test_time_is_linear(read: Callable[[str], object], pattern: str) -> None:
    """Four times the text takes at most six times as long."""

    def seconds(size: int) -> float:
        text = "x" + (pattern * size)[:size]
        times = []
        for _ in range(3):
            start = time.thread_time()
            read(text)
            times.append(time.thread_time() - start)
        return min(times)

    size = 4_000
    assert seconds(4 * size) < max(6 * seconds(size), 0.1)


@pytest.mark.parametrize("links", [[(0, 5)], [(5, 0)]])
def test_a_link_of_a_graph_to_no_node(tmp_path: Path, links: list[tuple[int, int]]) -> None:
    """rustworkx ends in a panic, which no `except Exception` catches."""
    path = tmp_path / "g.json"
    found = [{"source": a, "target": b, "data": {"count": "1"}} for a, b in links]
    graph = {"directed": True, "multigraph": True, "attrs": None, "nodes": [node()]}
    path.write_text(json.dumps(graph | {"links": found}))
    with pytest.raises(ValueError, match="g.json: expected a saved graph .*a link must join"):
        load_graph(path)


TYPES = {
    "unknown": ({"answer_type": "numbr"}, "answer_type must be one of"),
    "unknown, without an answer": ({"answer_type": "numbr", "answer": None}, "answer_type must be"),
    "none of its type": ({"answer_type": "date"}, "expected an answer of the domain 'date'"),
    "another than before": ({"answer_type": "number", "teacher": "u"}, "answer_type must be None"),
}


@pytest.mark.parametrize("name", TYPES)
def test_import_names_the_row_of_a_bad_answer_type(tmp_path: Path, name: str) -> None:
    change, words = TYPES[name]
    other = {} if "another" in name else {"prompt": "2 + 2?", "question_id": "p"}
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(GOOD | c) + "\n" for c in ({}, change | other)))
    with pytest.raises(ValueError) as error:
        import_files([(None, path)])
    assert str(error.value).startswith(f"{path}:2: ") and words in str(error.value)
