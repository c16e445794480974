"""compare and score from end to end with an untrained tiny student."""

import json
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import peft
import pytest
import torch

from compact.commands.cli import main
from compact.commands.recipe import RecipeConfig, read_settings
from compact.config import CompactConfig
from compact.data import load_problems
from compact.evaluation import arm_tables, compare, score
from compact.evaluation.arms import Arm, parse_arm
from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.registry import IMPORT_VARIABLE, import_modules
from compact.student import Student
from compact.weighting import make_weigher


@pytest.fixture(scope="module")
def tiny():
    tokenizer = build_tokenizer()
    return lambda: (build_model(tokenizer, 0, hidden=16, layers=1), tokenizer)


@pytest.fixture
def task(tiny, tmp_path, monkeypatch):
    """Zoo B in small, with an untrained student."""
    monkeypatch.setattr(compare, "load_zoo_student", lambda *a, **k: tiny())
    return compare.zoo_task(
        "b", problems=8, questions=4, epochs=1, stage="early", cache=tmp_path / "none"
    )


def test_every_word_of_the_zoo_has_a_token(tiny):
    _, tokenizer = tiny()
    for row in zoo.make_rows(tuple(zoo.TEACHERS), 60, seed=9):
        text = row["prompt"] + "\n" + row["completion"]
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_compare_writes_tables_and_never_repeats_a_run(task, tmp_path, monkeypatch):
    arms = [parse_arm(text) for text in ("uniform", "single:honest")]
    arms.append(parse_arm("oracle", compare.zoo.RIGHT))
    summary = compare.compare(task, arms, [0, 1], tmp_path)
    by_name = {arm["name"]: arm for arm in summary}
    assert by_name["uniform"]["right_weight"] == pytest.approx(1 / 3, abs=1e-5)
    assert by_name["oracle"]["right_weight"] == pytest.approx(1.0)
    assert by_name["single:honest"]["tokens"] == pytest.approx(
        by_name["uniform"]["tokens"], rel=0.2
    )
    assert by_name["single:honest"]["steps"] > by_name["uniform"]["steps"]
    for suffix in ("md", "csv", "json", "png"):
        assert (tmp_path / f"compare.{suffix}").stat().st_size > 0
    assert len((tmp_path / "compare.csv").read_text().splitlines()) == 7
    monkeypatch.setattr(compare, "CompactTrainer", None)  # a second training would fail
    again = compare.compare(task, arms, [0, 1], tmp_path)
    assert [arm["values"] for arm in again] == [arm["values"] for arm in summary]
    with pytest.raises(ValueError, match="other settings"):
        compare.compare(task, arms, [0], tmp_path, tokens=100)


@pytest.mark.parametrize("lora", [False, True])
def test_compare_measures_what_a_student_forgets_and_what_a_run_costs(task, tmp_path, lora):
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    texts = [row["prompt"] for row in zoo.make_rows(("good",), 3, seed=5)]
    task = replace(
        task,
        retained=texts,
        peft_config=lambda: adapter if lora else None,
        config=replace(task.config, learning_rate=0.1),
    )
    (arm,) = compare.compare(task, [parse_arm("uniform")], [0], tmp_path)
    assert arm["kl"] > 1e-6
    assert arm["student_perplexity"] != arm["base_perplexity"]
    tokenizer = task.start(0)[1]
    base = task.start(0)[0].eval()
    alone = compare.text_drift(base, deepcopy(base), tokenizer, texts)
    assert arm["base_perplexity"] == pytest.approx(alone["base_perplexity"], rel=1e-4)
    assert arm.get("peak_mb", 1.0) > 0  # some systems cannot measure it
    run = json.loads((tmp_path / "runs.jsonl").read_text())
    assert run["drift"]["text"]["kl"] == arm["kl"]
    header, row = (line.split(",") for line in (tmp_path / "compare.csv").read_text().splitlines())
    assert float(dict(zip(header, row, strict=True))["kl"]) == pytest.approx(arm["kl"], rel=1e-3)
    table = (tmp_path / "compare.md").read_text()
    assert "KL to base" in table
    page = tmp_path / "page.md"
    command = [sys.executable, "tools/study_page.py", str(tmp_path / "compare.csv")]
    subprocess.run([*command, "--page", str(page)], check=True)
    text = page.read_text()
    assert f"| uniform | 0 | {arm['tokens']:,} |" in text
    assert f"| {arm['kl']:.4f} |" in text


def test_arms_without_retained_texts_have_no_column_of_them(task, tmp_path):
    compare.compare(task, [parse_arm("uniform")], [0], tmp_path)
    table = (tmp_path / "compare.md").read_text()
    assert "seconds" in table
    assert "KL" not in table


def test_rows_of_runs_without_costs_are_read(task, tmp_path):
    """Runs of an earlier version have neither memory nor drift."""
    arms = [parse_arm("uniform")]
    compare.compare(task, arms, [0], tmp_path)
    file = tmp_path / "runs.jsonl"
    row = json.loads(file.read_text())
    del row["peak_mb"]
    file.write_text(json.dumps(row) + "\n")
    (arm,) = compare.compare(task, arms, [0], tmp_path)
    assert "peak_mb" not in arm


def test_other_retained_texts_are_other_settings(tmp_path):
    rows = zoo.make_rows(("good", "verbose"), 2, seed=1)
    data, recipe, texts = (tmp_path / n for n in ("data.jsonl", "recipe.yaml", "texts.txt"))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(f"model: {tmp_path}\n")
    settings = read_settings(recipe, [])

    task = compare.file_task(str(data), [str(data)], recipe, *settings, model=None, limit=None)
    texts.write_text("one text\n\nanother\n")
    before = compare.with_retained(task, str(texts))
    assert before.about != task.about
    assert before.retained == ["one text", "another"]
    shorter = compare.file_task(
        *(str(data), [str(data)], recipe), *settings, model=None, limit=None, max_new_tokens=8
    )
    assert shorter.about != task.about and shorter.max_new_tokens == 8
    texts.write_text("one text\n\nyet another\n")
    assert compare.with_retained(task, str(texts)).about != before.about
    texts.write_text("\n")
    with pytest.raises(ValueError, match="expected at least one text, got none"):
        compare.with_retained(task, str(texts))


def test_what_the_data_do_not_allow_is_told_before_the_first_run(tmp_path, caplog):
    rows = zoo.make_rows(("good", "verbose"), 3, seed=1)
    data, test, recipe = (tmp_path / n for n in ("data.jsonl", "test.jsonl", "recipe.yaml"))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = {"question_id": "other", "prompt": f" {rows[0]['prompt']}\n", "answer": "1"}
    new = {"question_id": "new", "prompt": "Who?", "answer": "1"}
    test.write_text(json.dumps(again) + "\n" + json.dumps(new) + "\n")
    recipe.write_text(f"model: {tmp_path}\n")
    settings = recipe, *read_settings(recipe, [])
    read = {"model": None, "limit": None}
    task = compare.file_task(str(data), [str(test)], *settings, **read)
    assert "test: 1 of its 2 questions are in the training data too" in caplog.text
    assert task.config.model_init_kwargs is None
    for arm, message in (
        ("single:gpt4", "no rationale of teacher 'gpt4' in the data; its teach"),
        ("rejection,gold=false", "preset: rejection needs gold answers, and no row of the data"),
        ("uniform,strategy=crsd,strategy_options={nce: 0},gold=false", "strategy: crsd needs gold"),
    ):
        arms = [parse_arm("single:good"), parse_arm(arm)]
        with pytest.raises(ValueError, match=message):
            compare.compare(task, arms, [0], tmp_path / "out")


def test_a_student_that_came_with_an_adapter_is_compared_with_that(task):
    lora = peft.LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )

    def start(seed):
        torch.manual_seed(5)
        model, *rest = task.start(seed)
        return peft.get_peft_model(model, lora), *rest

    adapted = replace(task, start=start)
    student, tokenizer = start(0)[:2]
    found = compare._drift(adapted, 0, student, tokenizer, ["Tom has 2 apples ."])
    assert found["kl"] == pytest.approx(0.0, abs=1e-9)


def test_a_number_of_drift_that_is_not_finite_is_left_out(task, tmp_path):
    student = task.start(0)[0]
    with torch.no_grad():
        student.get_output_embeddings().weight.fill_(torch.nan)
    found = compare._drift(task, 0, student, task.start(0)[1], ["Tom has 2 apples ."])
    assert found["kl"] is None


def test_arms_of_like_names_are_runs_of_their_own(task, tmp_path):
    arms = [parse_arm(f"random,seed={seed}") for seed in (1, 2)]
    arms += [Arm(name, "uniform", {}) for name in ("甲", "乙")]
    summary = compare.compare(task, arms, [0], tmp_path)
    assert len(list((tmp_path / "runs").iterdir())) == 4
    assert summary[0]["weights"] != summary[1]["weights"]


def test_changed_data_is_not_given_the_old_result(tmp_path):
    rows = zoo.make_rows(("good", "verbose"), 2, seed=1)
    data, test, recipe = (tmp_path / name for name in ("data.jsonl", "test.jsonl", "recipe.yaml"))
    for file in (data, test):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(f"model: {tmp_path}\n")

    def about():
        settings = read_settings(recipe, [])
        task = compare.file_task(str(data), [str(test)], recipe, *settings, model=None, limit=None)
        return task.about

    before = about()
    assert about() == before
    for file in (data, test):
        file.write_text(file.read_text() + "\n")
        assert about() != before
        before = about()
    (tmp_path / "model.safetensors").write_bytes(b"0" * 100)
    assert about() != before


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_is_tested_merged_and_in_the_format_it_trained_in(task, tmp_path, monkeypatch, bf16):
    tested = []
    real = compare.evaluate

    def evaluate(model, *args, **kwargs):
        tested.append(model)
        return real(model, *args, **kwargs)

    monkeypatch.setattr(compare, "evaluate", evaluate)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    config = replace(task.config, bf16=bf16, use_cpu=True)
    task = replace(task, peft_config=lambda: lora, config=config)
    compare.compare(task, [parse_arm("uniform")], [0], tmp_path)
    assert not isinstance(tested[0], peft.PeftModel)
    assert tested[0].dtype == (torch.bfloat16 if bf16 else torch.float32)


def test_an_arm_without_any_right_rationale_is_refused(task, tmp_path):
    """Where no rationale is right, `oracle` has nothing to train on."""
    arm = parse_arm("oracle,teachers=[nobody]", compare.zoo.RIGHT)
    assert arm.overrides == {"teachers": ["nobody"]}
    with pytest.raises(ValueError, match="must have a rationale that preset oracle trains on"):
        compare.compare(task, [arm], [0], tmp_path)


def test_an_arm_that_reads_nothing_is_refused_before_the_first_run(task, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "run_arm", None)
    arms = [parse_arm("uniform"), parse_arm("oracle,teachers=[nobody]", compare.zoo.RIGHT)]
    with pytest.raises(ValueError, match="that preset oracle trains on, got none in 8 problems"):
        compare.compare(task, arms, [0], tmp_path)


@pytest.fixture
def runs_at_once(monkeypatch):
    """Runs of arms that take no time; their names."""
    made = []

    def run_arm(task, arm, seed, folder, tokens):
        made.append((arm.name, seed))
        row = {"arm": arm.name, "seed": seed, "accuracy": 0.5, "right_weight": 0.5}
        row |= {"weights": {"t": 1.0}, "tokens": 1, "steps": 1, "seconds": 1.0}
        return row | {"right": {"test": "10"}}

    monkeypatch.setattr(compare, "run_arm", run_arm)
    return made


def test_runs_that_the_tables_leave_out_are_told(task, tmp_path, runs_at_once, capsys):
    arms = [parse_arm("uniform"), parse_arm("random")]
    compare.compare(task, arms, [0, 1], tmp_path)
    assert "the tables hold" not in capsys.readouterr().out
    compare.compare(task, arms[:1], [0, 1, 2], tmp_path)
    assert runs_at_once[-1] == ("uniform", 2) and len(runs_at_once) == 5
    told = capsys.readouterr().out
    assert "the tables hold the arms and seeds of this command" in told
    assert f"{tmp_path / 'runs.jsonl'} has 2 more" in told


def test_runs_of_code_that_was_edited_are_refused(
    task, tmp_path, runs_at_once, own_registries, monkeypatch
):
    """Only those of arms that name it; another module may be added."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    module = tmp_path / "policy_of_test_compare.py"
    module.write_text(
        "from compact import register_policy\n\n\n"
        "@register_policy('of_test_compare')\n"
        "def mine():\n    return lambda pass_, steps: pass_.batch.token_offsets.diff() * 0.5\n"
    )
    (tmp_path / "more_of_test_compare.py").write_text("")
    monkeypatch.setenv(IMPORT_VARIABLE, "")
    import_modules(["policy_of_test_compare"])
    arms = [parse_arm("uniform"), parse_arm("of_test_compare")]
    compare.compare(task, arms, [0], tmp_path / "out")
    import_modules(["more_of_test_compare"])
    compare.compare(task, arms, [0], tmp_path / "out")
    module.write_text(module.read_text() + "# edited\n")
    compare.compare(task, arms[:1], [0], tmp_path / "out")
    with pytest.raises(ValueError, match="of_test_compare-0 was made with other code of policy_of"):
        compare.compare(task, arms, [0], tmp_path / "out")
    assert len(runs_at_once) == 2


def test_arms_may_change_the_trainer_and_drop_the_gold_answers():
    arm = parse_arm("robust,token_weights=eaft,gold=false,tau=2,max_rationales_per_problem=3")
    settings = {"token_weights": "eaft", "max_rationales_per_problem": 3}
    assert (arm.settings, arm.gold, arm.overrides) == (settings, False, {"tau": 2})
    problems = load_problems(zoo.make_rows(("good",), 1, seed=1))
    assert arm.seen(problems)[0].answer is None
    assert parse_arm("robust").seen(problems) == problems
    with pytest.raises(ValueError, match="gold of robust must be true or false, got 'no way'"):
        parse_arm("robust,gold=no way")
    with pytest.raises(ValueError, match="eaft"):
        parse_arm("robust,token_weights=eat")
    name = "max_rationales_per_problem"
    for value in ("1.5", "true", "two"):
        with pytest.raises(ValueError, match=f"--arms: {name} of robust must be .* got"):
            parse_arm(f"robust,{name}={value}")


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("robust,max_rationales_per_problem=0", "must be a whole number of at least 1, got 0"),
        ("uniform,strategy=crsd,max_rationales_per_problem=2", "must be None with strategy crsd"),
    ],
)
def test_arms_that_the_trainer_refuses_are_refused_at_once(task, tmp_path, arm, message):
    with pytest.raises(ValueError, match=f"max_rationales_per_problem {message}"):
        compare.compare(task, [parse_arm("uniform"), parse_arm(arm)], [0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_of_a_recipe_that_only_training_follows(task, tmp_path):
    """A comparison has no checkpoints, no evaluation data and no model to push."""
    kept = {"save_steps": 10, "eval_steps": 10, "save_strategy": "steps", "eval_strategy": "steps"}
    only = {"load_best_model_at_end": True, "eval_on_start": True, "push_to_hub": True}
    config = replace(task.config, resume_from_checkpoint=True, **only, **kept)
    found = parse_arm("robust").configured(config)
    assert found.resume_from_checkpoint is None
    assert not any(getattr(found, name) for name in only)
    compare.compare(replace(task, config=config), [parse_arm("uniform")], [0], tmp_path)
    assert "uniform" in (tmp_path / "compare.md").read_text()


def test_a_recipe_may_limit_rationales_of_every_arm(task, tmp_path):
    """A strategy that reads what it is given takes the steps of the same arm without it."""
    limited = replace(task, config=replace(task.config, max_rationales_per_problem=1))
    with pytest.raises(ValueError, match="must be None with strategy crsd"):
        compare.compare(limited, [parse_arm("uniform,strategy=crsd")], [0], tmp_path)
    arms = [parse_arm("uniform"), parse_arm("uniform,strategy=aqg")]
    compare.compare(limited, arms, [0], tmp_path)
    rows = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    steps = [row["steps"] for row in rows if "steps" in row]
    assert len(steps) == 2 and steps[0] == steps[1]


def test_a_study_in_miniature(tiny, tmp_path, monkeypatch, capsys):
    """A recipe alone starts it; it goes on after a stop, and takes arms that are added later."""
    rows = zoo.make_rows(("good", "verbose"), 6, seed=1)
    data, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test.write_text("".join(json.dumps(r) + "\n" for r in zoo.make_rows(("good",), 3, seed=2)))
    (tmp_path / "more").mkdir()
    other = tmp_path / "more/test.jsonl"
    other.write_text(test.read_text())
    monkeypatch.setattr(compare, "load_student", lambda *a, **k: tiny())
    recipe = tmp_path / "study.yaml"

    def study(arms, status=0):
        text = f"""model: {tmp_path}
data: {data}
tests: [{test}, {other}]
development: 2
seeds: [0, 1]
arms: {json.dumps(arms)}
use_peft: false
use_cpu: true
num_train_epochs: 1
max_length: 512
max_new_tokens: 4
"""
        recipe.write_text(text)
        options = ["--config", str(recipe), "--out", str(tmp_path / "out")]
        assert main(["compare", *options]) == status
        return [json.loads(line) for line in (tmp_path / "out/runs.jsonl").read_text().splitlines()]

    trained = []
    real = compare.run_arm

    def stopped(task, arm, *rest):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(arm.name)
        return real(task, arm, *rest)

    monkeypatch.setattr(compare, "run_arm", stopped)
    arms = ["uniform", "robust,gold=false,token_weights=eaft"]
    assert len(study(arms, status=130)) == 2
    monkeypatch.setattr(compare, "run_arm", real)
    first = study(arms)
    assert len(first) == 4
    later = study(["single:good", "single:verbose", *arms[::-1]])
    assert later[:4] == first and len(later) == 8
    names = {f"{tmp_path.name}/test", "more/test", "development"}
    assert all(set(run["right"]) == names for run in later)
    assert all(len(run["right"]["development"]) == 2 for run in later)
    table = (tmp_path / "out/paired.md").read_text()
    assert "best single (" in table and "over uniform" in table and "development" not in table
    assert (tmp_path / "out/paired.png").stat().st_size > 0
    page = tmp_path / "out/study.csv"
    page.write_bytes((tmp_path / "out/paired.csv").read_bytes())
    subprocess.run([sys.executable, "tools/study_page.py", str(page)], check=True)
    assert table in page.with_suffix(".md").read_text()
    # On a page elsewhere, every file replaces what lies between its own two lines, and no more.
    both, other = tmp_path / "pages/both.md", tmp_path / "out/other.csv"
    both.parent.mkdir()
    other.write_bytes(page.read_bytes())
    lines = ["# Both", "<!-- ../out/study.csv -->", "<!-- end of ../out/study.csv -->", "between"]
    lines += ["<!-- ../out/other.csv -->", "<!-- end of ../out/other.csv -->", "after"]
    both.write_text("\n".join(lines) + "\n")
    for file in (page, other, page):
        command = [sys.executable, "tools/study_page.py", str(file), "--page", str(both)]
        subprocess.run(command, check=True)
    text = both.read_text()
    assert text.count(table) == 2 and [x for x in text.splitlines() if x in lines] == lines
    assert "(../out/study.png)" in text and "(../out/other.png)" in text


def test_questions_that_cannot_be_judged_are_refused_before_training(task, tmp_path, monkeypatch):
    """A test question without a gold answer; a development set larger than the answers."""
    monkeypatch.setattr(compare, "CompactTrainer", None)  # nothing is trained
    model, tokenizer, _ = task.start(0)
    unknown = [replace(task.problems(0)[0], answer=None)]
    asked = replace(task, start=lambda seed: (model, tokenizer, {"test": unknown}))
    with pytest.raises(ValueError, match="must have a gold answer, got none"):
        compare.run_arm(asked, parse_arm("uniform"), 0, tmp_path / "run", None)


def test_development_questions_have_answers(tmp_path):
    """They are drawn from the problems with a gold answer."""
    rows = zoo.make_rows(("good",), 4, seed=1)
    data = tmp_path / "train.jsonl"
    rows = [
        rows[0] | {"answer": None},
        *rows[1:],
        rows[0] | {"question_id": "more", "answer": None},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps(rows[1]) + "\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\n")
    read = {"model": "m", "limit": None}
    config = CompactConfig(str(tmp_path), use_cpu=True)

    def held(development):
        settings = (recipe, RecipeConfig(), config)
        task = compare.file_task(str(data), [str(test)], *settings, development=development, **read)
        return task.about["development"]

    assert held(3) == 3
    with pytest.raises(ValueError, match="--development must be at most 3, .* got 4"):
        held(4)


def test_what_a_killed_process_was_writing_is_no_foreign_file(task, tmp_path):
    """The run is started again."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".0123456789abcdef.writing").write_text("{")
    (folder / "orion.jsonl").write_text("{}")
    found = compare.run_arm(task, parse_arm("uniform"), 0, folder, None)
    assert found["steps"] > 0
    (folder / "other").write_text("")
    with pytest.raises(ValueError, match="found other; choose another --out"):
        compare.run_arm(task, parse_arm("uniform"), 0, folder, None)


def test_arm_settings_are_read_and_checked():
    arm = parse_arm("robust,tau=0.5,consensus=answer")
    assert arm.overrides == {"tau": 0.5, "consensus": "answer"}
    arm = parse_arm("robust,beta=[0, 1, 0],validity=none")
    assert arm.overrides == {"beta": [0, 1, 0], "validity": "none"}
    assert parse_arm("single:a, b").preset == "single:a, b"
    with pytest.raises(ValueError, match="override of oracle: teachers must .* use rejection"):
        parse_arm("oracle")
    with pytest.raises(ValueError, match="NAME,key=value"):
        parse_arm("robust,tau")
    with pytest.raises(ValueError, match="tau of robust must be a YAML value, got '\\['"):
        parse_arm("robust,tau=[")
    with pytest.raises(ValueError, match="tua"):
        parse_arm("robust,tua=1")


def test_intervals_over_seeds_are_students_and_equal_seeds_have_none():
    def of(name, *accuracies):
        costs = {"weights": {}, "tokens": 1, "steps": 1, "seconds": 1.0, "right_weight": 1.0}
        return [costs | {"arm": name, "seed": i, "accuracy": a} for i, a in enumerate(accuracies)]

    arms = {"uniform": of("uniform", 0.4, 0.5, 0.6), "robust": of("robust", 0.5, 0.6, 0.7)}
    uniform, robust = arm_tables.summarise(arms)
    assert uniform["mean"] == pytest.approx(0.5)
    assert uniform["ci_high"] - 0.5 == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert 0.5 - uniform["ci_low"] == pytest.approx(uniform["ci_high"] - 0.5)
    # Equal values of seeds say nothing about other seeds, as one seed does.
    assert robust["right_weight"] == 1.0 and robust["right_weight_low"] is None
    assert robust["gain"] == pytest.approx(0.1)
    assert robust["gain_low"] is robust["gain_high"] is None
    for seeds in (1, 2):
        (arm,) = arm_tables.summarise({"uniform": of("uniform", *[0.13] * seeds)})
        assert arm["mean"] == 0.13 and arm["ci_low"] is arm["ci_high"] is None
        table = arm_tables.as_markdown([arm])
        assert "| uniform | 0.130 | - |" in table
        weights = {"a|b": 0.5} | arm["weights"]
        other = arm_tables.as_markdown([arm | {"name": "single:a|b", "weights": weights}])
        lines = other.replace("\\|", "").splitlines()
        assert len({line.count("|") for line in lines}) == 1 and "| single:a\\|b |" in other
        assert arm_tables.draw([arm], "title")


@pytest.mark.parametrize("preset", ["robust", "uniform", "released"])
def test_score_gives_a_row_a_rationale_and_goes_on_where_it_was(tiny, tmp_path, preset):
    model, tokenizer = tiny()
    student = Student.of(model, tokenizer)
    problems = load_problems(zoo.make_rows(("good", "wrong-step", "filler"), 6, seed=1))
    partial = tmp_path / "scores.partial"

    def rows():
        return score.score_problems(
            student, tokenizer, problems, make_weigher(preset), partial=partial, settings={"a": 1}
        )

    first = rows()
    assert len(first) == 18
    for problem in problems:
        mine = [row for row in first if row["question_id"] == problem.question_id]
        assert [row["teacher"] for row in mine] == ["good", "wrong-step", "filler"]
        assert sum(row["weight"] for row in mine) == pytest.approx(1.0, abs=1e-5)
        assert all(row["steps"] for row in mine)
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[:4]) + lines[4][:20])  # killed within a line
    again = rows()
    assert [row["teacher"] for row in again] == [row["teacher"] for row in first]
    for a, b in zip(again, first, strict=True):
        assert a["weight"] == pytest.approx(b["weight"], abs=1e-4)
    assert all(json.loads(line) for line in partial.read_text().splitlines())


def test_data_that_cannot_be_encoded_leave_the_scores_unlocked(tiny, tmp_path):
    model, tokenizer = tiny()
    problems = load_problems(zoo.make_rows(("good", "wrong-step"), 1, seed=1))
    student, partial = Student.of(model, tokenizer), tmp_path / "scores.partial"
    for _ in ("new", "begun"):
        given = (student, tokenizer, problems, make_weigher("robust"))
        with pytest.raises(ValueError, match="max_length = 3") as error:
            score.score_problems(*given, max_length=3, partial=partial)
        assert len(score.score_problems(*given, max_length=512, partial=partial)) == 2
        assert error.value.__traceback__ is not None


def test_metric_overrides_are_read():
    assert score.parse_metrics(["consensus=answer"]) == {"consensus": "answer"}
    with pytest.raises(ValueError, match="AXIS=NAME"):
        score.parse_metrics(["vote=answer"])


@pytest.mark.parametrize(
    ("wanted", "problems", "batch", "micros", "steps"),
    [
        (20, 5, 1, 4, 8),  # four epochs of 4 + 1 problems
        (19, 5, 1, 4, 7),  # the last one has only the step of 4
        (19.6, 5, 1, 4, 8),
        (8, 8, 2, 2, 2),
        (1, 8, 2, 2, 0),
        (3, 8, 2, 2, 1),
        (10, 3, 2, 4, 3),  # a step is at most an epoch
    ],
)
def test_the_short_last_step_of_an_epoch_counts_as_short(wanted, problems, batch, micros, steps):
    assert compare.steps_for(wanted, problems, batch, micros) == steps
