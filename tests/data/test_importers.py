"""`compact import`: every format, problems joined by prompt, and errors with file and line."""

import functools
import json
import re

import pytest

from compact.answers import find_domain
from compact.data import importers, load_problems, load_questions
from helpers.commands import run

command = functools.partial(run, "import")


def write(path, rows, *, array=False):
    text = json.dumps(rows, indent=1) if array else "".join(json.dumps(r) + "\n" for r in rows)
    path.write_text(text)
    return path


def rows_of(*paths, gold=None):
    return importers.import_files([(None, path) for path in paths], gold)[0]


def test_alpaca_with_input_label_system_and_history(tmp_path):
    rows = [
        {
            "instruction": "Add.",
            "input": "2 and 3",
            "output": "2 + 3 = 5. The answer is 5",
            "label": 5,
        },
        {
            "instruction": "And 4?",
            "output": "The answer is 9",
            "system": "Be brief.",
            "history": [["2 + 3?", "5"]],
            "answer": "9",
        },
    ]
    first, second = rows_of(write(tmp_path / "gpt-4o.json", rows, array=True))
    assert first == {
        "question_id": "problem-00000",
        "prompt": "Add.\n2 and 3",
        "teacher": "gpt-4o",
        "completion": "2 + 3 = 5. The answer is 5",
        "answer": "5",
    }
    assert [(m["role"], m["content"]) for m in second["prompt"]] == [
        ("system", "Be brief."),
        ("user", "2 + 3?"),
        ("assistant", "5"),
        ("user", "And 4?"),
    ]


def test_sharegpt_and_openai_messages(tmp_path):
    rows = [
        {
            "conversations": [
                {"from": "human", "value": "2 + 3?"},
                {"from": "gpt", "value": "The answer is 5"},
            ],
            "answer": "5",
        }
    ]
    chat = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "2 + 4?"},
                {"role": "assistant", "content": "6"},
            ],
            "label": "6",
        }
    ]
    first, second = rows_of(write(tmp_path / "a.json", rows), write(tmp_path / "b.json", chat))
    assert (first["prompt"], first["completion"]) == ("2 + 3?", "The answer is 5")
    assert [m["role"] for m in second["prompt"]] == ["system", "user"]
    assert second["completion"] == "6"


def test_mcc_kd_gives_every_rationale_a_teacher(tmp_path):
    rows = [{"instruction": "2 + 3?", "output": ["It is 5.", "2 and 3 make 5."], "label": "5"}]
    got = rows_of(write(tmp_path / "chatgpt.json", rows, array=True))
    assert [r["teacher"] for r in got] == ["chatgpt-1", "chatgpt-2"]
    assert {r["question_id"] for r in got} == {"problem-00000"}


def test_question_cot_answer_states_the_answer(tmp_path):
    rows = [
        {"Question": "2 + 3?", "CoT": "2 + 3 = 5", "Answer": "5"},
        {"Question": "2 + 4?", "CoT": "2 + 4 = 6. The answer is 6", "Answer": "6"},
    ]
    got = rows_of(write(tmp_path / "x.jsonl", rows))
    assert got[0]["completion"] == "2 + 3 = 5\nThe answer is 5"
    assert got[1]["completion"] == "2 + 4 = 6. The answer is 6"


def test_teachers_of_several_files_meet_at_the_prompt(tmp_path, capsys):
    human = [
        {"instruction": "2 + 3?", "output": "#### 5"},
        {"instruction": "2 + 4?", "output": "#### 6"},
    ]
    other = [
        {"instruction": "2 + 4? ", "output": "2 + 4 = 6. The answer is 6"},
        {"instruction": "2 + 3?", "output": "2 + 3 = 4. The answer is 4"},
        {"instruction": "2 + 3?", "output": "2 + 3 = 4.  The answer is 4"},
    ]
    human, other = write(tmp_path / "h.json", human), write(tmp_path / "o.json", other)
    out = tmp_path / "new" / "train.jsonl"
    assert command(f"human={human}", f"big={other}", "--gold", human, "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 problems, 4 rationales of 2 teachers (human 2, big 2) -> ")
    problems = load_problems(out)
    assert [p.question_id for p in problems] == ["train-00000", "train-00001"]
    assert [p.answer for p in problems] == ["5", "6"]
    assert [r.teacher for r in problems[0].rationales] == ["human", "big"]
    assert problems[0].rationales[1].completion == "2 + 3 = 4. The answer is 4"
    # Our own rows read back as they are.
    assert rows_of(out) == [
        {**json.loads(x), "question_id": f"problem-0000{i // 2}"}
        for i, x in enumerate(out.read_text().splitlines())
    ]


ALPACA = '{"instruction": "2 + 3?", "output": "5", "label": "5"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.json: expected at least one row, got none"),
        ("[]", "x.json: expected at least one row, got none"),
        ('{"a": 1', "x.json:1: expected JSON, got Expecting"),
        (ALPACA + "\n\n{oops}\n", "x.json:4: expected JSON, got Expecting property name"),
        (ALPACA + "5\n", "x.json:2: expected a JSON object, got int"),
        ("[\n" + ALPACA + ",\n3]", "x.json:4: row 2: expected a JSON object, got int"),
        ("[\n" + ALPACA + ALPACA, "x.json:3: expected ',' or ']' after row 1, got '{\"instruction"),
        ("[\n" + ALPACA, "x.json:3: expected ',' or ']' after row 1, got the end of the file"),
        ('{"text": "hello"}', "x.json:1: expected the fields of alpaca .* got text"),
        (ALPACA + '{"instruction": "1?", "output": ""}', "x.json:2: field 'output' must hold text"),
        (
            ALPACA + '{"instruction": "1?"}',
            "x.json:2: field 'output' must hold text, got fields inst",
        ),
        (
            '{"instruction": "1?", "output": [], "label": "1"}',
            "x.json:1: output must list at least",
        ),
        (
            '{"conversations": [{"from": "human", "value": "1"}]}',
            "x.json:1: .* at least two messages",
        ),
        (
            '{"conversations": [{"from": "human", "value": "1"}, {"from": "tool", "value": "2"}]}',
            r"x.json:1: conversations\[1\] must come from human, .* got 'tool'",
        ),
        (
            '{"conversations": [{"from": "gpt", "value": "1"}, {"from": "human", "value": "2"}]}',
            "x.json:1: conversations must end with the assistant, got 'user'",
        ),
        ('{"instruction": "1?", "output": "1", "history": ["a"]}', "x.json:1: history must hold"),
        ('{"question": "1?", "cot": "1", "answer": []}', "x.json:1: .*'answer' .* got list"),
        ('{"instruction": "1?", "output": "1", "history": true}', "x.json:1: history must hold"),
        ('{"instruction": "1?", "output": [3], "label": "1"}', r"x.json:1: output\[0\] must hold"),
        ('{"instruction": "1?", "output": "1", "label": NaN}', "x.json:1: .*'label' .* got float"),
        ('{"instruction": "\\ud800", "output": "1"}', "x.json:1: .* surrogate"),
        ("[" * 3000, "x.json:1: row 1: expected a JSON object, got one nested too deeply"),
        ('{"a": ' * 3000, "x.json:1: expected at most 64 levels"),
        (
            '{"question_id": "a", "prompt": [[]], "answer": "1"}',
            r"x.json:1: prompt\[0\] must be an object, got list",
        ),
        (
            '{"question_id": "a", "prompt": "1?", "answer": "1"}',
            "x.json: expected at least one completion, got only questions; the fields are ques",
        ),
        (
            ALPACA + '{"instruction": "2  + 3?", "output": "6", "label": "6"}',
            "x.json:2: answer '6' disagrees with '5' of the same prompt at .*x.json:1; .* --gold",
        ),
    ],
)
def test_bad_files_name_the_line(text, message, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        command(path, "--out", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_our_own_chat_rows_and_prompts_that_differ_in_white_space_merge(tmp_path):
    chat = [{"role": "user", "content": "2 + 3?"}]
    said = [{"role": "assistant", "content": "The answer is 5"}]
    row = {"question_id": "q", "prompt": chat, "teacher": "a", "completion": said, "answer": "5"}
    mine = write(tmp_path / "mine.json", [row, row | {"teacher": "b"}])
    rows = [{"instruction": "1?", "output": "The answer is 1", "label": "1"}]
    rows.append({"instruction": "1?\n", "output": "so 1", "label": "1.0"})
    one, two = write(tmp_path / "c.json", rows[:1]), write(tmp_path / "d.json", rows[1:])
    assert command(mine, one, two, "--out", tmp_path / "out.jsonl") == 0
    problems = load_problems(tmp_path / "out.jsonl")
    assert [p.prompt for p in problems] == [chat, "1?"]
    assert [[r.teacher for r in p.rationales] for p in problems] == [["a", "b"], ["c", "d"]]
    assert problems[0].rationales[0].completion == said


def test_a_lone_message_is_the_same_question_as_its_text(tmp_path):
    """TRL's two forms of one question meet; a lone system message is no question of the user."""
    chat = [{"role": "user", "content": "2 + 3?"}]
    said = [{"role": "assistant", "content": "The answer is 5"}]
    one = write(tmp_path / "a.json", [{"prompt": chat, "completion": said}])
    two = write(tmp_path / "b.json", [{"messages": [*chat, *said]}])
    gold = write(tmp_path / "gold.json", [{"question": "2 + 3?", "answer": "5"}])
    found = rows_of(one, two, gold=gold)
    assert {row["question_id"] for row in found} == {"problem-00000"} and len(found) == 2
    system = [{"role": "system", "content": "2 + 3?"}]
    (row,) = rows_of(write(tmp_path / "s.json", [{"messages": [*system, *said]}]))
    assert row["prompt"] == system


def test_rationales_under_other_names_and_answers_that_are_true(tmp_path):
    rows = [{"Question": "Is 2 even?", "Explanation": "It is 2 times 1.", "Answer": True}]
    (row,) = rows_of(write(tmp_path / "x.json", rows))
    assert row["completion"] == "It is 2 times 1.\nThe answer is true" and row["answer"] == "true"
    rows = [{"question_id": 7, "conversations": [{"from": "human", "value": "1?"}] * 2}]
    with pytest.raises(ValueError, match="conversations must end with the assistant"):
        rows_of(write(tmp_path / "y.json", rows))
    rows = [{"instruction": "1?", "output": ["1"]}, {"instruction": "2?", "output": "two"}]
    with pytest.raises(ValueError, match="z.json:2: output must list at least one text, got two"):
        rows_of(write(tmp_path / "z.json", rows))


def test_a_column_for_each_teacher(tmp_path, capsys):
    rows = [
        {"Question": "1 + 1?", "gpt-4-ltm": "It is 2", "small": "It is 3", "answer": 2},
        {"Question": "2 + 2?", "gpt-4-ltm": "It is 4", "small": "", "answer": 4},
    ]
    wide, out = write(tmp_path / "wide.json", rows), tmp_path / "out.jsonl"
    with pytest.raises(ValueError, match="got only questions; .* question, gpt_4_ltm, small, answ"):
        command(wide, "--out", out)
    command(wide, "--columns", "small", "gpt-4-ltm", "--out", out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["teacher"], r["completion"], r["answer"]) for r in found] == [
        ("small", "It is 3", "2"),
        ("gpt-4-ltm", "It is 2", "2"),
        ("gpt-4-ltm", "It is 4", "4"),
    ]
    assert "2 problems, 3 rationales of 2 teachers" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--columns must be among the fields question, .*'gpt4'"):
        command(wide, "--columns", "gpt4", "--out", out)
    with pytest.raises(ValueError, match="--columns names the teachers; files must be FILE, got"):
        command(f"a={wide}", "--columns", "small", "--out", out)


@pytest.mark.parametrize(
    ("rest", "prompt", "answer"),
    [
        ({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}, "1 + 1?", "2"),
        ({"question": "1 + 1?", "answer": "So #### 2", "rationale": "as 2"}, "1 + 1?", "2"),
        ({"question": "1 + 1?", "label": 2}, "1 + 1?", "2"),
        ({"question": "1 + 1?"}, "1 + 1?", None),
        ({"instruction": "Add.", "input": "1, 1", "label": "2"}, "Add.\n1, 1", "2"),
        ({"instruction": "Add.", "input": "", "output": "so 2", "answer": "2"}, "Add.", "2"),
        (
            {"instruction": "Add.", "input": "1", "system": "Be brief.", "output": ["x"]},
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Add.\n1"}],
            None,
        ),
        (
            {"prompt": [{"role": "user", "content": "1 + 1?"}], "answer": 2},
            [{"role": "user", "content": "1 + 1?"}],
            "2",
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "1 + 1?"},
                    {"from": "gpt", "value": "2"},
                ]
            },
            "1 + 1?",
            None,
        ),
    ],
)
def test_beside_columns_a_row_is_read_as_its_format_says(rest, prompt, answer, tmp_path):
    path = write(tmp_path / "wide.json", [rest | {"gpt-4": "It is 2", "small": "Two"}])
    found = importers.import_files([(None, path)], columns=["gpt-4", "small"])[0]
    assert [(row["teacher"], row["completion"]) for row in found] == [
        ("gpt-4", "It is 2"),
        ("small", "Two"),
    ]
    (problem,) = load_problems(found)
    assert (problem.prompt, problem.answer) == (prompt, answer)


def test_columns_of_the_format_itself_and_rows_without_a_question(tmp_path):
    """In GSM8K's rows the answer is the rationale of a human."""
    rows = [{"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2", "small": "It is 3"}]
    path = write(tmp_path / "wide.json", rows)
    found = importers.import_files([(None, path)], columns=["answer", "small"])[0]
    assert [(row["completion"], row["answer"]) for row in found] == [
        ("1 + 1 = 2\n#### 2", "2"),
        ("It is 3", "2"),
    ]
    path = write(tmp_path / "none.json", [{"riddle": "1 + 1?", "small": "It is 3"}])
    with pytest.raises(
        ValueError, match="none.json:1: expected a question as .*got the fields rid"
    ):
        importers.import_files([(None, path)], columns=["small"])


def test_a_row_without_a_rationale_names_what_it_may_be_called(tmp_path):
    rows = [{"question": "1?", "rationale": "so 1", "answer": 1}, {"question": "2?", "answer": 2}]
    with pytest.raises(ValueError, match="x.json:2: expected a rationale as cot, rationale, expl"):
        rows_of(write(tmp_path / "x.json", rows))


def test_a_named_teacher_without_a_completion(tmp_path):
    one = write(tmp_path / "a.json", [{"question": "1?", "cot": "so 1"}])
    two = write(tmp_path / "b.json", [{"question": "1?", "thoughts": "so 1", "answer": "1"}])
    with pytest.raises(ValueError, match="b.json: expected completions of b, got only questions"):
        command(f"a={one}", f"b={two}", "--out", tmp_path / "out.jsonl")


def test_gold_answers_that_disagree(tmp_path):
    path = write(tmp_path / "x.json", [{"instruction": "1?", "output": "1"}])
    golds = [{"question": "1?", "answer": "5"}, {"question": "1?", "answer": "5.0"}]
    gold = write(tmp_path / "gold.json", [*golds, {"question": "1?", "answer": "7"}])
    with pytest.raises(ValueError, match="gold.json:3: answer '7' disagrees with '5' of the same"):
        command(path, "--gold", gold, "--out", tmp_path / "out.jsonl")


def test_rows_without_gold_answers(tmp_path, capsys):
    """A prompt takes the answer of any of its rows; the last line counts those that have none."""
    one = write(
        tmp_path / "a.json", [{"question": "1?", "cot": "so 1"}, {"question": "2?", "cot": "2"}]
    )
    two = write(tmp_path / "b.json", [{"instruction": "1?", "output": ["so 1"], "label": "1.0"}])
    out = tmp_path / "out.jsonl"
    assert command(one, two, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "problems without a gold answer: 1\n" in printed and "left out" not in printed
    assert [(p.answer, len(p.rationales)) for p in load_problems(out)] == [("1.0", 2), (None, 1)]
    assert [row.get("answer") for row in rows_of(out)] == ["1.0", "1.0", None]
    question = write(tmp_path / "q.json", [{"question_id": "q", "prompt": "1?"}])
    with pytest.raises(ValueError, match="q.json:1: field 'answer' must hold text, got a row"):
        command(one, "--gold", question, "--out", out)


def test_bytes_that_are_no_text_and_absent_files(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="x.json:1: expected UTF-8 text"):
        command(tmp_path / "x.json", "--out", tmp_path / "out.jsonl")
    with pytest.raises(FileNotFoundError, match="absent.json"):
        command(tmp_path / "absent.json", "--out", tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"must be \[TEACHER=\]FILE, got '=x.json'"):
        command("=x.json", "--out", tmp_path / "out.jsonl")


def test_a_prompt_that_the_gold_file_lacks(tmp_path):
    gold = write(tmp_path / "gold.json", [{"instruction": "1?", "output": "1"}])
    path = write(tmp_path / "x.json", [{"instruction": "2?", "output": "2"}])
    with pytest.raises(ValueError, match="x.json:1: .*gold.json has no such prompt"):
        command(path, "--gold", gold, "--out", tmp_path / "out.jsonl")
    gold = write(tmp_path / "gold.json", [{"instruction": "1?", "output": "word " * 20}])
    with pytest.raises(ValueError, match="gold.json:1: expected a final answer"):
        command(path, "--gold", gold, "--out", tmp_path / "out.jsonl")


def test_some_questions_are_held_out_for_a_test(tmp_path, capsys):
    rows = [
        {"instruction": f"{i} + 1?", "output": [f"#### {i + 1}", "It is 3."], "label": str(i + 1)}
        for i in range(30)
    ]
    source = write(tmp_path / "t.json", rows, array=True)
    more = write(tmp_path / "more.json", rows[::-1], array=True)
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    assert command(source, "--out", train, "--test_out", test) == 0
    printed = capsys.readouterr().out
    assert f"-> {train}\n3 problems for a test -> {test}\n" in printed
    held = {p.prompt for p in load_questions(test)}
    assert len(held) == 3 and {p.answer for p in load_questions(test)} != {None}
    trained = load_problems(train)
    assert len(trained) == 27 and not held & {p.prompt for p in trained}
    assert all(len(p.rationales) == 2 for p in trained + load_problems(test))
    # Another teacher, in another order: the same questions are held out.
    assert command(more, source, "--out", train, "--test_out", test, "--test_share", 0.2) == 0
    assert held < {p.prompt for p in load_questions(test)}
    assert {len(p.rationales) for p in load_problems(test)} == {4}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--test_share", "0.5"], "--test_share needs --test_out"),
        (
            ["--test_out", "test.jsonl", "--test_share", "1"],
            "above 0 and below 1, got 1.0",
        ),
        (
            ["--test_out", "test.jsonl", "--test_share", "nan"],
            "above 0 and below 1, got nan",
        ),
        (["--test_out", "train.jsonl"], "another file than --out, got train.jsonl"),
        (["--test_out", "t.jsonl"], "another file than the input files, got t.jsonl"),
        (
            ["--test_out", "test.jsonl"],
            "must hold out 1 of the problems with a gold answer and keep one",
        ),
    ],
)
def test_bad_tests_are_refused_and_write_nothing(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "t.jsonl", [{"prompt": "2 + 3?", "completion": "It is 5."}])
    before = (tmp_path / "t.jsonl").read_text()
    with pytest.raises(ValueError, match=re.escape(message)):
        command("t.jsonl", "--out", "train.jsonl", *options)
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]
    assert (tmp_path / "t.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("rationale", "gold"),
    [
        (r"So \boxed{2\sqrt{3}}", r"2\sqrt{3}"),
        ("The answer is (2, 3].", "(2, 3]"),
        (r"It is \boxed{\{1,2\}}", "{1,2}"),
        (r"\boxed{y = 2x+3}", "y = 2x+3"),
        ("The answer is Paris.", "Paris"),
        ("So the answer is (B).", "(B)"),
        ("The answer is $1,200.", "1200"),
        ("48 + 24 = 72\n#### 72", "72"),
    ],
)
def test_the_gold_answer_of_a_rationale_is_what_it_states(rationale: str, gold: str) -> None:
    """So the rationale itself has the answer."""
    sample = importers.from_question({"question": "What?", "answer": rationale}, "f:1")
    assert sample.answer == gold
    domain = find_domain(gold, "What?")
    assert domain.matches(domain.extract(rationale), gold)
