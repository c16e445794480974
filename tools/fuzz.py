"""Fuzzes the readers of text and of files: make fuzz [MINUTES=1] [TARGETS="rows yaml"] [SEED=1].

A reader must end in a result, or in an error of one line that names the file, within a time linear
in its input. Inputs are changed seeds; half of them repeat a part until time that grows faster than
the input shows. What breaks this is made shorter and saved as build/fuzz/TARGET, and
`tools/fuzz.py TARGET FILE` runs it again. What ran how long: docs/results/fuzz.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "build/fuzz"
LONGEST = 6000  # bytes of an input: enough that quadratic time shows
SECONDS, SECONDS_A_BYTE = 0.5, 2e-4

sys.path.insert(0, str(ROOT))


class Target(NamedTuple):
    """What is fuzzed: a reader of text or of a file, and inputs to start from."""

    read: Callable[[Any], object]
    seeds: tuple[str | bytes, ...]
    kind: str  # "text", or "file": the error must name the file
    suffix: str = ""


ROW = {"question_id": "q", "prompt": "1 + 1?", "teacher": "t", "completion": "2", "answer": "2"}
ROWS = "".join(json.dumps(ROW | change) + "\n" for change in ({}, {"teacher": "u", "answer": 2}))
CHAT = json.dumps(
    ROW
    | {
        "prompt": [{"role": "user", "content": "x"}],
        "completion": [{"role": "assistant", "content": "<think>a</think>2"}],
        "answer_type": "number",
    }
)
GRAPH = json.dumps(
    {
        "directed": True,
        "multigraph": True,
        "attrs": None,
        "nodes": [
            {
                "id": i,
                "data": {"text": "a", "teachers": "t", "support": "1.0"}
                | {"arithmetic": "none", "mainstream": "true"},
            }
            for i in range(2)
        ],
        "links": [{"source": 0, "target": 1, "id": 0, "data": {"count": "2"}}],
    }
)
RUN = json.dumps(
    {
        "student": "s",
        "status": "complete",
        "settings": {"preset": "robust"},
        "log_history": [{"loss": 1.0, "step": 1, "weight/a": 0.5}],
        "arms": [],
        "global_step": 1,
        "weigher": {},
        "gains": {},
        "versions": {"torch": "2"},
        "data": "d",
        "command": "c",
    }
)
TEXTS = (
    *(
        "The answer is (B).",
        "#### 1,234.50",
        "\\boxed{\\frac{1}{2}}",
        "<think>x</think> 12/05/2020",
    ),
    *(
        "So 3 + 4 = 7, and 7 * 2 = 14. Therefore, yes.",
        "$x^2 = 4$, x = \\pm 2 \\sqrt{3}",
        "half a dozen",
    ),
    *("Options:\n(A) dog\n(B) cat\nAnswer: A", "1e9999", "3 1/2 % of $20 is 0.7", "(-\\infty, 3]"),
    *(
        "Step 1: a. Mr. B. \\begin{a}x\\end{a}",
        "twenty-one thousand and three",
        "**Final answer:** no",
    ),
)
YAML = (
    "model: a\ndata: b.jsonl\noutput_dir: c\npreset: robust\nlearning_rate: 2.0e-4\n",
    "overrides: {tau: 0.5}\nlora_target_modules: [a, b]\nseed: 1\nmodel_init_kwargs: {}\n",
)
TEACHERS = (
    "teachers:\n- name: a\n  base_url: http://localhost:1/v1\n  model: m\n  api_key_env: K\n",
)
CSV = 'question_id,prompt,teacher,completion,answer\nq,1+1?,t,"so, 2",2\nq,1+1?,u,2,2\n'
FORMATS = tuple(
    json.dumps(row) + "\n"
    for row in (
        {"instruction": "1 + 1?", "input": "x", "output": "2", "history": [["a", "b"]]},
        {"instruction": "1 + 1?", "output": ["2", "two"], "label": "2"},
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "2"}]},
        {"Question": "1 + 1?", "CoT": "1 + 1 = 2", "Answer": "2", "answer_type": "number"},
        {"question": "1 + 1?", "answer": "1 + 1 = 2 #### 2"},
        {"question": "1 + 1?", "options": ["A)1", "B)2"], "rationale": "2", "correct": "B"},
        {"problem": "a", "choices": {"label": ["1", "2"], "text": ["b", "c"]}, "cot": "b"},
    )
)
KEYS = struct.pack("<Q13sII", 13, b"a.block_count", 4, 2) + struct.pack(
    "<Q1sIIQQ1sQ1s", 1, b"t", 9, 8, 2, 1, b"a", 1, b"b"
)
GGUF = (
    struct.pack("<4sIQQ", b"GGUF", 3, 1, 2)
    + KEYS
    + struct.pack("<Q1sIQIQ", 1, b"w", 1, 8, 0, 0)
    + bytes(64)
)


def as_parquet(rows: list[dict[str, str]]) -> bytes:
    """Returns rows as the bytes of a Parquet file."""
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


def targets() -> dict[str, Target]:
    """Returns the targets by name. Imports what they fuzz."""
    from compact import answers as A
    from compact.commands.recipe import read_settings
    from compact.data import load_problems, load_questions
    from compact.data.importers import gold_answers, import_files
    from compact.data.labelled import load_labelled
    from compact.evaluation.arms import parse_arm
    from compact.evaluation.forgetting import read_texts
    from compact.evaluation.keep import kept_by
    from compact.files import parse_json, parse_yaml, read_json
    from compact.graphs.step_graphs import load_graph
    from compact.report.run import read_run
    from compact.resumable import ResumableRows
    from compact.student.gguf_header import check_gguf
    from compact.teachers.spec import read_teachers
    from compact.text import equations as E
    from compact.text import numbers as N
    from compact.text import steps as S
    from compact.trainer.checkpoints import damage
    from compact.trainer.saving import read_state

    options = (("A", "dog"), ("B", "the cat"), ("C", "7"))
    domains = [A.Choice(options), A.YesNo(), A.Date(), A.Number(), A.ShortText(), A.General()]

    def extract(text: str) -> None:
        for domain in domains:
            found = domain.extract(text)
            assert found is None or domain.matches(found, found), (domain, found)
            domain.states(text)

    def compare(text: str) -> None:
        half = len(text) // 2
        for domain in domains:
            normal = domain.normalise(text)
            assert domain.normalise(normal) == normal, (domain, normal)
            one, two = text[:half], text[half:]
            assert domain.matches(one, two) == domain.matches(two, one), (domain, one, two)

    def mathematics(text: str) -> None:
        half = len(text) // 2
        domain = A.Mathematics()
        domain.decide(domain.extract(text), text[half:])
        domain.decide(text[:half], text[half:])

    def domain_of(text: str) -> None:
        gold, _, prompt = text.partition("\n\n")
        domain = A.find_domain(gold or None, prompt, completions=[text])
        domain.alternatives(gold or None, prompt)
        domain.question(prompt)
        domain.extract(prompt)

    def steps(text: str) -> None:
        end = 0
        for step in S.split_steps(text):
            assert end <= step.start < step.end <= len(text)
            end = step.end
            S.concludes(step.text)
        S.find_markers(text)

    def sums(text: str) -> None:
        E.equations.__wrapped__(text)
        E.numbers.__wrapped__(text)

    def words(text: str) -> None:
        N.numbers_in_words(text)
        N.parse_number_words(text)
        number = N.parse_number(text)
        assert number is None or N.parse_number(N.format_number(number)) is not None

    def partial(path: Path) -> None:
        """The rows, or, from a byte NUL on, the summary."""
        rows, mark, side = path.read_bytes().partition(b"\0")
        path.with_name("x.summary.json").write_bytes(side if mark else b'{"settings": {"a": 1}}')
        path.write_bytes(rows)
        ResumableRows(path, {"a": 1}, key="id", shape={"n?": int}).__exit__(None, None, None)

    def of_folder(*names: str) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
        """A reader of a folder, one of whose files has the fuzzed content."""

        def with_reader(read: Callable[[Path], object]) -> Callable[[Path], object]:
            def run(path: Path) -> object:
                content = path.read_bytes()
                which, rest = (content[0] if content else 0) % len(names), content[1:]
                folder = path.with_name("folder")
                folder.mkdir(exist_ok=True)
                for i, name in enumerate(names):
                    (folder / name).write_bytes(rest if i == which else RUN.encode())
                return read(folder)

            return run

        return with_reader

    rows = [{"question_id": "q", "weight": 0.5, "consensus": 0.1, "validity": 1, "difficulty": 2}]

    def gguf(path: Path) -> None:
        """What the check lets through, the library reads in linear time, whatever it says."""
        import gguf as library

        check_gguf(path, 4096)
        with contextlib.suppress(ValueError, KeyError, IndexError, UnicodeDecodeError, TypeError):
            library.GGUFReader(path)

    as_run = of_folder("run.json", "compare.json", "trainer_state.json")
    as_checkpoint = of_folder("compact_state.json", "trainer_state.json", "manifest.json")
    numbered = tuple(bytes([i]) + RUN.encode() for i in range(3))
    return {
        "extract": Target(extract, TEXTS, "text"),
        "compare": Target(compare, TEXTS, "text"),
        "mathematics": Target(mathematics, TEXTS, "text"),
        "domain": Target(domain_of, TEXTS, "text"),
        "steps": Target(steps, TEXTS, "text"),
        "equations": Target(sums, TEXTS, "text"),
        "numbers": Target(words, TEXTS, "text"),
        "keep": Target(
            lambda t: kept_by(rows, t),
            ("weight > 0.5/K", "not validity == 1 and -difficulty < 2"),
            "text",
        ),
        "arm": Target(parse_arm, ("robust,tau=0.5", "uniform,strategy=mot,gold=false"), "text"),
        "json": Target(
            lambda text: parse_json(text, "FILE"), (ROWS, GRAPH, "[[1e5, null]]"), "text"
        ),
        "yaml": Target(lambda text: parse_yaml(text, "FILE"), YAML, "text"),
        "recipe": Target(lambda path: read_settings(path, []), YAML, "file", ".yaml"),
        "teachers": Target(read_teachers, TEACHERS, "file", ".yaml"),
        "rows": Target(load_problems, (ROWS, CHAT), "file", ".jsonl"),
        "questions": Target(load_questions, (ROWS, CHAT), "file", ".jsonl"),
        "array": Target(
            lambda path: import_files([(None, path)]), (f"[{CHAT}]", ROWS), "file", ".json"
        ),
        "csv": Target(
            lambda path: import_files([(None, path)]),
            (CSV, "question,cot,answer\n1+1?,1+1=2,2\n"),
            "file",
            ".csv",
        ),
        "parquet": Target(
            lambda path: import_files([(None, path)]), (as_parquet([ROW]),), "file", ".parquet"
        ),
        "formats": Target(lambda path: import_files([(None, path)]), FORMATS, "file", ".jsonl"),
        "gold": Target(gold_answers, (ROWS, *FORMATS), "file", ".jsonl"),
        "texts": Target(read_texts, ('{"text": "a b"}\n{"text": "c"}\n',), "file", ".jsonl"),
        "options": Target(
            lambda text: read_settings(None, text.split("\n")),
            ("--model\na\n--learning_rate=1e-5", "--lora_target_modules\na,b\n--seed=1"),
            "text",
        ),
        "labelled": Target(load_labelled, (ROWS, CHAT), "file", ".jsonl"),
        "partial": Target(
            partial, ('{"id": "a", "n": 1}\n', '{"id": "b"}\n\0{"settings": {}}'), "file", ".jsonl"
        ),
        "run": Target(as_run(read_run), numbered, "file", ".json"),
        "checkpoint": Target(
            as_checkpoint(lambda folder: (damage(folder), read_state(folder, "robust", None))),
            numbered,
            "file",
            ".json",
        ),
        "adapter": Target(read_json, ('{"peft_type": "LORA"}',), "file", ".json"),
        "graph": Target(load_graph, (GRAPH,), "file", ".json"),
        "gguf": Target(gguf, (GGUF,), "file", ".gguf"),
    }


def unfolded(data: bytes) -> bytes:
    """Returns the input that bytes stand for: after NUL, a part of them is repeated.

    0, A, B, rest stands for rest with rest[A:A + B] repeated up to `LONGEST` bytes. So the fuzzer
    finds patterns whose time grows faster than their length.
    """
    if len(data) < 4 or data[0]:
        return data
    start, size, rest = data[1], data[2] % 32 + 1, data[3:]
    piece = rest[start : start + size]
    if not piece:
        return rest
    return rest[:start] + piece * (LONGEST // len(piece)) + rest[start + size :]


def run(name: str, target: Target, data: bytes, folder: Path) -> None:
    """Runs a target on an input; raises AssertionError, or what the reader should not raise."""
    if target.kind == "text":
        value: Any = unfolded(data).decode("utf-8", "replace")
        size = len(value)
    else:
        value = folder / f"x{target.suffix}"
        content = unfolded(data)
        size = len(content)
        value.write_bytes(content)
    from compact.commands.cli import MOST_OF_A_LINE, one_line

    times: list[float] = []
    for _ in range(3):  # a busy machine may slow down one of them
        start = time.thread_time()
        try:
            target.read(value)
        except (ValueError, OSError, TypeError) as error:
            if isinstance(error, TypeError) and target.kind == "text":
                raise
            text = one_line(error)
            assert 0 < len(text) <= MOST_OF_A_LINE, f"{name}: {text[:200]!r}"
            assert target.kind == "text" or str(folder) in text, f"{name}: names no file: {text!r}"
        times.append(time.thread_time() - start)
        if times[-1] < SECONDS + SECONDS_A_BYTE * size:
            return
        if target.kind == "file":
            value.write_bytes(content)
    raise AssertionError(f"{name}: {min(times):.2f} s for {size} characters")


PIECES = (
    *(
        "0",
        "1",
        "9",
        "-",
        "+",
        "*",
        "/",
        "=",
        ".",
        ",",
        ":",
        ";",
        "%",
        "$",
        "^",
        "_",
        "|",
        "~",
        "`",
    ),
    *(
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "<",
        ">",
        '"',
        "'",
        "\\",
        "#",
        "&",
        "!",
        "?",
        "@",
        " ",
        "\n",
        "\t",
    ),
    *("\r\n", "\0", "\ufeff", "\u2028", "\u00a0", "\ud7ff", "\U0001f600", "e999", "1e400", "NaN"),
    *(
        "Infinity",
        "null",
        "true",
        "\\u",
        "\\ud800",
        "9" * 40,
        "the answer is ",
        "#### ",
        "\\boxed{",
    ),
    *(
        "\\frac{1}{2}",
        "<think>",
        "</think>",
        "(A) ",
        "yes",
        "no",
        "12/05/2020",
        "and a half",
        "twenty",
    ),
    *(
        "hundred ",
        "Therefore, ",
        "\\text{",
        "$$",
        "\\[",
        "**",
        "- ",
        "? ",
        "&a ",
        "*a",
        "<<: ",
        "!!python/x",
    ),
    *(
        "[" * 70,
        "{" * 70,
        '{"a":' * 70,
        "not ",
        "-" * 300,
        "(" * 300,
        "half a dozen ",
        "one ",
        "x^2",
    ),
)


def mutated(random: Random, seeds: Sequence[bytes]) -> bytes:
    """Returns one of the seeds with one to eight changes; half of them with a repeated part."""
    data = bytearray(random.choice(seeds))
    for _ in range(random.choice((1, 1, 2, 3, 5, 8))):
        at = random.randint(0, len(data))
        end = min(len(data), at + random.choice((0, 1, 1, 2, 4, 8, 32)))
        piece = random.choice(PIECES).encode()
        other = random.choice(seeds)
        start = random.randint(0, len(other))
        data[at:end] = random.choice(
            (
                piece,
                piece * random.choice((2, 8, 40)),
                b"",
                bytes([random.randrange(256)]),
                other[start : start + random.choice((1, 4, 16, 64))],
                bytes(data[at:end]) * 2,
            )
        )
    if random.random() < 0.5:
        return bytes(data)[:LONGEST]
    start = random.randrange(min(len(data), 256) + 1) % 256
    return b"\0" + bytes([start, random.randrange(16)]) + bytes(data)


def fuzz(name: str, target: Target, seconds: float, seed: int) -> tuple[int, bytes | None, str]:
    """Fuzzes a target for some seconds.

    Returns:
        The number of inputs, the input of a finding (or None), and what happened with it.
    """
    random = Random(f"{name} {seed}")
    seeds = [s.encode() if isinstance(s, str) else s for s in target.seeds]
    end, count = time.monotonic() + seconds, 0
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as folder:
        while time.monotonic() < end:
            data = mutated(random, seeds)
            count += 1
            why = finding(name, target, data, Path(folder))
            if why:
                return count, smaller(name, target, data, Path(folder)), why
            if random.random() < 0.002 and len(data) < 2000 and data[:1] != b"\0":
                seeds.append(data)  # changes add up
    return count, None, ""


def finding(name: str, target: Target, data: bytes, folder: Path) -> str:
    """Returns what is wrong with the result of an input, "" if nothing is."""
    try:
        run(name, target, data, folder)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # that is what is looked for, a panic of Rust too
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:300]} ({where.filename}:{where.lineno})"
    return ""


def smaller(name: str, target: Target, data: bytes, folder: Path) -> bytes:
    """Returns a shorter input with a finding: parts are left out while there is one."""
    size = len(data) // 2
    end = time.monotonic() + 30
    while size and time.monotonic() < end:
        at = 0
        while at < len(data) and time.monotonic() < end:
            less = data[:at] + data[at + size :]
            if finding(name, target, less, folder):
                data = less
            else:
                at += size
        size //= 2
    return data


def main(arguments: list[str]) -> int:
    """Runs the targets in turn; returns 1 if there is a finding."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    known = targets()
    if len(arguments) == 2 and Path(arguments[1]).is_file():
        with tempfile.TemporaryDirectory() as folder:
            run(arguments[0], known[arguments[0]], Path(arguments[1]).read_bytes(), Path(folder))
        print("no finding")
        return 0
    minutes, *names = arguments or ["1"]
    seed = int(os.environ.get("SEED", time.time()))
    print(f"SEED={seed}, {minutes} minutes a target", flush=True)
    found = 0
    for name in names or known:
        used = time.process_time()
        count, data, why = fuzz(name, known[name], 60 * float(minutes), seed)
        used = time.process_time() - used
        print(f"{name:<12}{count:>9} inputs {used:6.0f} CPU s  {why or 'no finding'}", flush=True)
        if data is not None:
            found += 1
            OUT.mkdir(parents=True, exist_ok=True)
            (OUT / name).write_bytes(data)
            print(f"{'':<12} {data[:200]!r}, saved as {OUT / name}", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
