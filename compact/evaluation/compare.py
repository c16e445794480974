"""Trains on the same rationales with several weightings, at equal tokens, over seeds.

An arm is a preset or policy; settings to change follow its name after commas ("robust,tau=0.5"). So
does a strategy ("uniform,strategy=mot,strategy_options={rounds: 2}"), at equal optimizer steps, a
setting of the trainer ("robust,token_weights=eaft"), and gold=false, to train without the gold
answers. Every other arm trains on the same number of completion tokens, from the same student, on
the same problems. An arm that does not read some rationales sees fewer tokens per problem, so it
makes more passes over the problems.

OUT holds one folder per run (an arm with a seed), and compare.md, .csv, .json and .png;
`compact report OUT` shows them too. paired.csv, .md and .png compare the arms question by question
(`compact.evaluation.paired`). A finished run is a row of OUT/runs.jsonl and is not repeated,
so a killed comparison resumes with the next run.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pyarrow.compute as pc
import torch
import yaml

from compact.config import CompactConfig
from compact.data import (
    PreferencePair,
    Problem,
    load_problems,
    load_questions,
    load_test,
    text_of,
    warn_of_overlap,
)
from compact.data.rows import content_of_rows
from compact.evaluation import paired
from compact.evaluation.arm_tables import as_csv, as_markdown, draw, summarise
from compact.evaluation.arms import Arm
from compact.evaluation.evaluate import check_questions, evaluate
from compact.evaluation.forgetting import TEXT, Text, read_texts, text_drift
from compact.evaluation.imported import imports_of
from compact.evaluation.memory import peak_mb, release
from compact.evaluation.paired import DEVELOPMENT
from compact.evaluation.preference import encode_pairs, evaluate_pairs
from compact.files import (
    ANY_NUMBER,
    RECORDS,
    SHARE,
    check_output,
    content_of,
    content_of_student,
    is_unfinished,
    parse_yaml,
    read_text,
    write_whole,
)
from compact.graphs.drawing import picture_of
from compact.lab import zoo
from compact.lab.zoo_student import load_zoo_student
from compact.metrics import METRICS
from compact.passes.encode import encode_problem
from compact.resumable import ResumableRows
from compact.settings import ComparisonConfig, RecipeConfig
from compact.strategies import STRATEGIES, Strategy
from compact.student import load_student, peft_config
from compact.trainer import CompactTrainer
from compact.trainer.batches import ProblemDataset
from compact.trainer.progress import show_progress
from compact.trainer.runlog import read_scores
from compact.trainer.saving import command_line
from compact.trainer.setup import encoded, skips_of
from compact.weighting import POLICIES, PRESETS, TOKEN_WEIGHTS

logger = logging.getLogger(__name__)

_KIND = "comparison"
_NAMED_IN = (METRICS, POLICIES, PRESETS, STRATEGIES, TOKEN_WEIGHTS)
# All that a run of an arm writes into its folder, and the rows that a strategy makes beforehand:
# it saves neither checkpoints nor a model.
_OF_AN_ARM = {"scores", "run.json", "trainer_state.json", RECORDS}
_OF_AN_ARM |= {name + suffix for name in STRATEGIES for suffix in (".jsonl", ".summary.json")}
_RUN = {
    "arm": str,
    "seed": int,
    "accuracy": SHARE,
    "right_weight": SHARE,
    "weights": {str: SHARE},
    "tokens": int,
    "steps": int,
    "seconds": ANY_NUMBER,
    "peak_mb?": (ANY_NUMBER, None),
    "drift?": {str: {str: (ANY_NUMBER, None)}},
    "right": {str: str},
    "imports?": {str: str},
}

_Test = list[Problem] | list[PreferencePair]
_Start = tuple[Any, Any, dict[str, _Test]]


@dataclass(frozen=True)
class Task:
    """The data, student and settings that all arms share.

    Attributes:
        name: name of the data.
        start: seed -> (student, its tokenizer, test -> questions or preference pairs). The first
            test gives the accuracy; paired.md has all.
        problems: seed -> training problems.
        config: the trainer's settings; arm, seed, steps and folder are filled in.
        peft_config: () -> adapters to train, or None.
        right: problems -> (question_id, teacher) of the rationales that are right.
        about: everything that the results depend on.
        max_new_tokens: most tokens of an answer in the test.
        retained: texts to measure forgetting on; None to measure none.
    """

    name: str
    start: Callable[[int], _Start]
    problems: Callable[[int], list[Problem]]
    config: CompactConfig
    peft_config: Callable[[], Any]
    right: Callable[[Sequence[Problem]], set[tuple[str, str]]]
    about: dict[str, Any]
    max_new_tokens: int
    retained: Sequence[Text] | None = None


def zoo_task(
    which: str, *, problems: int, questions: int, epochs: float, stage: str, cache: Path
) -> Task:
    """Zoo A or B with a tiny student; the seed sets stories, errors and the order of training.

    Args:
        which: "a" or "b".
        problems: training problems.
        questions: test questions.
        epochs: passes over the problems for an arm with all teachers.
        stage: how far the student is trained, see `zoo_student.STAGES`.
        cache: folder of trained students.
    """
    the_zoo, the_zoo_name = zoo.ZOOS[which].sized(problems, questions), f"zoo-{which}"

    def start(seed: int) -> _Start:
        model, tokenizer = load_zoo_student(stage, 0, cache=cache)
        return model, tokenizer, {the_zoo_name: load_questions(the_zoo.test_rows(seed))}

    config = CompactConfig(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=1e-3,
        num_train_epochs=epochs,
        max_length=512,
        use_cpu=True,
    )
    return Task(
        name=the_zoo_name,
        start=start,
        problems=lambda seed: load_problems(the_zoo.rows(seed)),
        config=config,
        peft_config=lambda: None,
        right=lambda problems: {
            (p.question_id, r.teacher)
            for p in problems
            for r in p.rationales
            if r.teacher in zoo.RIGHT
        },
        about={"problems": problems, "questions": questions, "epochs": epochs, "stage": stage},
        max_new_tokens=110,
    )


def file_task(
    data: str,
    tests: Sequence[str],
    recipe_file: Path,
    recipe: RecipeConfig,
    config: CompactConfig,
    *,
    model: str | None,
    limit: int | None,
    development: int = 0,
    max_new_tokens: int = 256,
) -> Task:
    """Rationales and test questions from files, student and settings from a recipe.

    Args:
        data: file of rationales, JSON lines.
        tests: files of test questions or of preference pairs, JSON lines; see `load_test`.
        recipe_file: the file that recipe and config were read from.
        recipe: its model and LoRA settings are used, its data is not.
        config: its training settings are used; preset, overrides and output_dir are not.
        model: the student; replaces the recipe's.
        limit: largest number of questions or pairs of a test.
        development: so many problems, drawn with a seed of their own, are not trained on but
            tested, to choose between the arms of one teacher.
        max_new_tokens: most tokens of an answer to a test question.

    Raises:
        ValueError: the recipe names no model, or a row cannot be used.
        OSError: a file cannot be read.
    """
    name = model or recipe.model
    if name is None:
        raise ValueError(f"{recipe_file}: model must be given, there or as --model")
    if config.overrides:
        logger.warning(
            "%s: its overrides are not used; write settings of an arm after its name, as in "
            "robust,tau=0.5",
            recipe_file,
        )
    problems = load_problems(data)[: recipe.max_problems]
    if not 0 <= development < len(problems):
        raise ValueError(
            f"--development must be less than the {len(problems)} problems, got {development}"
        )
    known = [i for i, problem in enumerate(problems) if problem.answer is not None]
    if development > len(known):
        raise ValueError(
            f"--development must be at most {len(known)}, the problems with a gold answer, "
            f"got {development}"
        )
    held = set(Random(0).sample(known, development))
    questions: dict[str, _Test] = {
        name: load_test(test)[:limit] for name, test in zip(_test_names(tests), tests, strict=True)
    }
    if held:
        questions[DEVELOPMENT] = [problems[i] for i in sorted(held)]
    problems = [p for i, p in enumerate(problems) if i not in held]
    for test, asked in questions.items():
        warn_of_overlap(test, asked, problems)
    kwargs = config.model_init_kwargs  # the student is loaded here, not by the trainer

    def start(seed: int) -> _Start:
        assert not isinstance(kwargs, str)  # CompactConfig refuses text that is no mapping
        student, processing_class = load_student(name, is_trainable=True, **(kwargs or {}))
        return student, processing_class, questions

    return Task(
        name=data,
        start=start,
        problems=lambda seed: problems,
        config=replace(config, model_init_kwargs=None),
        peft_config=lambda: peft_config(replace(recipe, model=name)),
        right=lambda problems: {
            (p.question_id, r.teacher)
            for p in problems
            for r in p.rationales
            if p.domain.matches(p.domain.extract(text_of(r.completion)), p.answer)
        },
        about={
            "model": name,
            "weights": content_of_student(name),
            "data": content_of_rows(data),
            "test": ", ".join(tests),
            "questions": [content_of_rows(test) for test in tests],
            "limit": limit,
            "development": development,
            "recipe": _settings_of(recipe_file),
            # Comparisons begun when it was always 256 go on.
            **({"max_new_tokens": max_new_tokens} if max_new_tokens != 256 else {}),
        },
        max_new_tokens=max_new_tokens,
    )


def with_retained(task: Task, texts: str) -> Task:
    """Returns a task that also measures forgetting, on a file of texts; see `read_texts`.

    Raises:
        ValueError, OSError: as `read_texts`.
    """
    about = task.about | {"retained": content_of(texts)}
    return replace(task, about=about, retained=read_texts(texts))


def _test_names(tests: Sequence[str]) -> list[str]:
    """Returns a name for each test file: FOLDER/STEM, or the path where two have the same."""
    names = [f"{Path(test).parent.name}/{Path(test).stem}".lstrip("/") for test in tests]
    return names if len({*names, DEVELOPMENT}) > len(names) else list(tests)


def _settings_of(recipe: Path) -> str:
    """Returns what a recipe says about training, as YAML: arms and seeds may be added later."""
    given = parse_yaml(read_text(recipe), str(recipe)) or {}
    arms = {f.name for f in fields(ComparisonConfig)} - {"development"}
    return yaml.safe_dump({key: given[key] for key in given if key not in arms})


def run_arm(task: Task, arm: Arm, seed: int, folder: Path, tokens: int | None) -> dict[str, Any]:
    """Trains and tests one arm with one seed.

    Args:
        task: data, student and settings.
        arm: the weighting.
        seed: seed of everything random.
        folder: folder of the run; an unfinished run in it is removed.
        tokens: completion tokens to train on; None: the task's epochs over all rationales.

    Returns:
        arm, seed, accuracy, tokens, steps, seconds, weights (teacher -> mean share of a problem's
        weight), right_weight (share of the weight on right rationales), right (test -> text with 1
        or 0 for each question or pair), peak_mb (memory of training above that of the loaded
        student; None if it cannot be measured), and with retained texts drift ("text" -> what
        `text_drift` returns; None for a number that is not finite). The seconds are those of
        loading, training and tests.
    """
    names = (path.name for path in folder.glob("*"))
    foreign = sorted(name for name in names if name not in _OF_AN_ARM and not is_unfinished(name))
    if foreign:
        raise ValueError(
            f"{folder}: expected an unfinished run of this comparison, found {foreign[0]}; choose "
            "another --out"
        )
    shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    model, processing_class, tests = task.start(seed)
    for test in tests.values():  # what cannot be encoded is refused before hours of training
        if isinstance(test[0], PreferencePair):
            encode_pairs(test, processing_class)
        else:
            check_questions(test, processing_class)
    problems = task.problems(seed)
    known_right = task.right(problems)  # with the gold answers, also for an arm without them
    problems = arm.seen(problems)
    overrides = dict(arm.overrides)
    if arm.preset == "random":
        overrides.setdefault("seed", seed)
    config = arm.configured(
        task.config,
        output_dir=str(folder),
        overrides=overrides,
        seed=seed,
    )
    trainer = CompactTrainer(
        model,
        config,
        train_dataset=problems,
        processing_class=processing_class,
        peft_config=task.peft_config(),
    )
    read, weigher = trainer.train_dataset, trainer.weigher
    if arm.strategy is not None:  # it takes the steps of the same arm without it
        skips = skips_of(weigher, Strategy(), config)
        read = encoded(weigher, processing_class, config, problems, skips)
    assert read is not None
    tokens = tokens or _tokens(problems, processing_class, config)
    config.max_steps = steps = _steps(read, config, tokens)
    config.logging_steps = max(steps // 20, 1)
    show_progress(trainer)
    memory = peak_mb(trainer.train, trainer.args.device)
    drift, right = {}, {}
    if task.retained is not None:
        paused = time.monotonic()
        drift[TEXT] = _drift(task, seed, trainer.model, processing_class, task.retained)
        began += time.monotonic() - paused
    student = _as_tested(trainer.model, task.config)
    release()  # what training has freed, several GB, before the tests take as much
    for name, test in tests.items():
        right[name] = _tested(task, student, processing_class, test)
    first = next(iter(right.values()))
    return {
        "arm": arm.name,
        "seed": seed,
        "accuracy": first.count("1") / len(first),
        "steps": steps,
        "seconds": time.monotonic() - began,
        "peak_mb": memory if math.isfinite(memory) else None,
        **({"drift": drift} if drift else {}),
        "right": right,
        **_weights(folder, known_right),
    }


def _tested(task: Task, student: Any, processing_class: Any, test: _Test) -> str:
    """Returns a 1 or a 0 for each question or preference pair of a test: was the student right."""
    # No file of answers: a killed test is repeated with its run.
    found: dict[str, dict[str, Any]] = {}
    common: dict[str, Any] = {"progress": False, "items": found}
    if isinstance(test[0], PreferencePair):
        evaluate_pairs(student, processing_class, test, **common)
    else:
        common |= {"max_new_tokens": task.max_new_tokens, "batch_size": 128}
        evaluate(student, processing_class, test, **common)
    return "".join(str(int(found[item.question_id]["correct"])) for item in test)


def _drift(
    task: Task, seed: int, student: Any, processing_class: Any, texts: Sequence[Text]
) -> dict[str, float | None]:
    """Returns how far a trained student has moved from the one that it started as."""
    # Without a new adapter, a student that came with one started as more than its bare model.
    fresh = task.peft_config() is not None
    base = student if fresh else task.start(seed)[0].to(student.device).eval()
    found = text_drift(student.eval(), base, processing_class, texts)
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _as_tested(model: Any, config: CompactConfig) -> Any:
    """The trained student for its tests: an adapter merged, and bfloat16 if it trained in it."""
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    return model.to(torch.bfloat16) if config.bf16 else model


def _steps(data: ProblemDataset, config: CompactConfig, tokens: int) -> int:
    """Optimizer steps after which training has read so many completion tokens of the data."""
    read = [sum(len(r.ids) for r in data[i].problem.rationales) for i in range(len(data))]
    mean = sum(read) / len(read)
    batch, micros = config.per_device_train_batch_size, config.gradient_accumulation_steps
    return max(steps_for(tokens / mean, len(read), batch, micros), 1)


def _tokens(problems: Sequence[Problem], processing_class: Any, config: CompactConfig) -> int:
    """Completion tokens of all rationales, times the epochs."""
    length = config.max_length
    each = (encode_problem(p, processing_class, max_length=length) for p in problems)
    return math.ceil(sum(len(r.ids) for p in each for r in p.rationales) * config.num_train_epochs)


def steps_for(wanted: float, problems: int, batch: int, micros: int) -> int:
    """Returns the number of optimizer steps whose problems are nearest to `wanted`.

    The last step of an epoch has fewer problems than the others, if they do not divide evenly.

    Args:
        wanted: problems to train on, over all epochs.
        problems: problems of an epoch.
        batch: problems of a micro-batch.
        micros: micro-batches of a step.
    """
    an_epoch = -(-problems // (batch * micros))
    epochs, rest = divmod(wanted, problems)
    steps = int(rest // (batch * micros))
    before, after = (min(n * batch * micros, problems) for n in (steps, steps + 1))
    return int(epochs) * an_epoch + steps + int(after - rest < rest - before)


def _weights(folder: Path, right: set[tuple[str, str]]) -> dict[str, Any]:
    """Tokens and shares of the weight over a whole run, read from its log of scores."""
    table = read_scores(folder).select(["question_id", "teacher", "tokens", "weight", "nll"])
    total = pc.sum(table["weight"]).as_py() or 1.0  # 0 if the arm had no rationale to train on
    teachers: dict[str, float] = {}
    on_right = 0.0
    for question_id, teacher, weight in zip(
        *(table[name].to_pylist() for name in ("question_id", "teacher", "weight")), strict=True
    ):
        teachers[teacher] = teachers.get(teacher, 0.0) + weight / total
        on_right += weight / total * ((question_id, teacher) in right)
    return {
        "tokens": pc.sum(table["tokens"].filter(table["nll"].is_valid())).as_py(),
        "weights": teachers,
        "right_weight": on_right,
    }


def _run_name(arm: Arm, seed: int) -> str:
    return f"{quote(arm.name, safe='=,:')}-{seed}"


def _check_wanted(
    task: Task, wanted: Mapping[str, tuple[Arm, int]], finished: ResumableRows
) -> None:
    """Checks, before hours of training, the runs that are there, and the arms that are to run.

    Raises:
        ValueError: a run was made with code of --import that has changed since, or as
            `Arm.check_read`.
    """
    for run, (arm, _) in wanted.items():
        then = finished.done.get(run, {}).get("imports", {})
        now = imports_of(arm.names, _NAMED_IN).get("imports", {})
        for module, content in then.items():
            if now.get(module) != content:
                raise ValueError(
                    f"{finished.path}: {run} was made with other code of {module}; delete its line "
                    "to run it again, or choose another --out"
                )
    left = {
        arm.name: (arm, seed) for run, (arm, seed) in wanted.items() if run not in finished.done
    }
    unsure = [(arm, seed) for arm, seed in left.values() if arm.may_read_nothing]
    if unsure:
        seed = unsure[0][1]
        processing_class, problems = task.start(seed)[1], task.problems(seed)
        for arm, _ in unsure:
            arm.check_read(task.config, problems, processing_class)


def compare(
    task: Task, arms: Sequence[Arm], seeds: Sequence[int], out: Path, tokens: int | None = None
) -> list[dict[str, Any]]:
    """Runs every arm with every seed and writes the results to `out`.

    Arms and seeds may be added to a comparison later, and be in any order.

    Args:
        task: data, student and settings.
        arms: the weightings to compare.
        seeds: each arm is run once per seed.
        out: folder of the runs, of compare.md, .csv, .json, .png and of paired.md, .csv, .png.
        tokens: completion tokens of each run; None: the task's epochs over all rationales.

    Returns:
        A summary of each arm, see `summarise`.

    Raises:
        ValueError: `out` holds runs with other settings, or with code of --import that has changed
            since; the trainer would refuse an arm; or an arm has nothing to train on.
    """
    names = [f"compare.{suffix}" for suffix in ("json", "md", "csv", "png")]
    for name in (*names, "paired.md", "paired.csv", "paired.png"):
        check_output(out / name, kind=_KIND)
    problems = task.problems(seeds[0])
    for arm in arms:
        arm.check(task.config, problems)
    results: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in arms}
    wanted = {_run_name(arm, seed): (arm, seed) for seed in seeds for arm in arms}
    # Comparisons begun when the tokens of all rationales counted do not go on.
    asked = {"task": task.name, **task.about, "tokens_asked": tokens, "tokens_of": "what is read"}
    with ResumableRows(out / "runs.jsonl", asked, key="run", shape=_RUN) as finished:
        _check_wanted(task, wanted, finished)
        for done, (run, (arm, seed)) in enumerate(wanted.items(), 1):
            if run not in finished.done:
                result = run_arm(task, arm, seed, out / "runs" / run, tokens)
                finished.append({"run": run} | result | imports_of(arm.names, _NAMED_IN))
            result = finished.done[run]
            results[arm.name].append(result)
            print(
                f"[{done}/{len(wanted)}] {arm.name} seed {seed}: accuracy "
                f"{result['accuracy']:.3f}, weight on right {result['right_weight']:.2f}, "
                f"{result['seconds']:.0f} s",
                flush=True,
            )
        finished.complete({})
        if others := len(finished.done.keys() - wanted.keys()):
            print(
                f"the tables hold the arms and seeds of this command; {finished.path} has "
                f"{others} more, which are in the tables if they are named too"
            )
    summary = summarise(results)
    about = {
        "data": task.name,
        "metric": "accuracy",
        "token_budget": max(arm["tokens"] for arm in summary),
        "settings": task.about,
        "command": command_line(),
        "arms": summary,
    }
    figure = draw(summary, f"{task.name}, {len(seeds)} seeds, equal tokens")
    write_whole(out / "compare.json", json.dumps(about, indent=1) + "\n", kind=_KIND)
    write_whole(out / "compare.md", as_markdown(summary), kind=_KIND)
    write_whole(out / "compare.csv", as_csv(results), kind=_KIND)
    write_whole(out / "compare.png", picture_of(figure, "png", tidy=True), kind=_KIND)
    runs = [run for of_arm in results.values() for run in of_arm]
    rows = paired.paired_rows(paired.with_best_single(paired.answers_of(runs)))
    write_whole(out / "paired.csv", paired.as_csv(runs), kind=_KIND)
    write_whole(out / "paired.md", paired.as_markdown(rows), kind=_KIND)
    write_whole(out / "paired.png", picture_of(paired.draw(rows), "png", tidy=True), kind=_KIND)
    return summary
