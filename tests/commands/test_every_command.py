"""Every command with wrong input or a failing system: one clear line, a status other than 0."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from compact.commands.cli import main
from compact.config import CompactConfig
from compact.lab import zoo
from compact.settings import RecipeConfig
from compact.student import load_student, peft_config
from compact.trainer import CompactTrainer
from compact.trainer.checkpoints import newest_whole
from helpers.commands import fails
from helpers.toy import save_student


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student, data, questions, a recipe, a finished run, and broken ones."""
    root = tmp_path_factory.mktemp("place")
    save_student(root / "student")
    rows = zoo.make_rows(("good", "verbose"), 4, seed=1)
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = ("question_id", "prompt", "answer")
    (root / "questions.jsonl").write_text(
        "".join(json.dumps({k: row[k] for k in kept}) + "\n" for row in rows[::2])
    )
    (root / "bad.jsonl").write_text('{"question_id": 1}\n')
    (root / "recipe.yaml").write_text(
        f"model: {root / 'student'}\ndata: {root / 'data.jsonl'}\noutput_dir: {root / 'run'}\n"
        "use_peft: false\nnum_train_epochs: 1\nmax_length: 400\nuse_cpu: true\nreport_to: none\n"
    )
    (root / "empty").mkdir()
    shutil.copytree(root / "student", root / "no-config")
    (root / "no-config" / "config.json").write_text("{not json")
    shutil.copytree(root / "student", root / "truncated")
    weights = root / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    (root / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    assert main(["train", "--config", str(root / "recipe.yaml")]) == 0
    return root


def filled(argv: str, place: Path, out: Path) -> list[str]:
    """A command line with the names of the place's files, and OUT for a new file."""
    known = {path.name for path in place.iterdir()}
    return [
        str(out) if word == "OUT" else str(place / word) if word in known else word
        for word in argv.split()
    ]


BAD = [
    # a path that is not there, or is something else
    ("evaluate --model student --data gone.jsonl --out OUT", "gone.jsonl: no such file"),
    ("evaluate --model student --adapter empty --data questions.jsonl --out OUT", "adapter_config"),
    (
        "evaluate --model student --data questions.jsonl --limit 1 --max_new_tokens 2 "
        "--retained gone.txt --out OUT",
        "gone.txt",
    ),
    ("score gone.jsonl --model student --out OUT", "gone.jsonl: no such file"),
    ("score data.jsonl --model student --out empty", "expected a file, got a directory"),
    ("score data.jsonl --model student --out data.jsonl", "--out must be another file"),
    ("import data.jsonl --out data.jsonl", "--out must be another file"),
    ("compare gone.jsonl --config recipe.yaml --test questions.jsonl --out OUT", "gone.jsonl"),
    ("compare data.jsonl --config gone.yaml --test questions.jsonl --out OUT", "gone.yaml"),
    ("compare data.jsonl --config recipe.yaml --test gone.jsonl --out OUT", "gone.jsonl"),
    ("report gone", "gone: no such run folder"),
    ("report empty", "empty: expected the score log"),
    ("report run --question_id nobody --out OUT", "no question_id 'nobody'"),
    ("import gone.jsonl --out OUT", "gone.jsonl: no such file"),
    ("import data.jsonl --gold gone.jsonl --out OUT", "gone.jsonl: no such file"),
    ("graph gone.json --out OUT", "gone.json: no such file"),
    ("train --config gone.yaml", "gone.yaml: no such file"),
    ("train --config empty", "expected a file, got a directory"),
    # a row, a key or a value that cannot be used
    ("evaluate --model student --data bad.jsonl --out OUT", "bad.jsonl:1: field 'prompt' is"),
    ("evaluate --model student --data questions.jsonl --limit -1 --out OUT", "--limit"),
    ("evaluate --model student --data questions.jsonl --limit x --out OUT", "invalid int"),
    ("evaluate --model student --data questions.jsonl --answer_type x --out OUT", "choose from"),
    (
        "evaluate --model student --data questions.jsonl --answer_type date --out OUT",
        "expected an answer of the domain 'date'",
    ),
    ("score bad.jsonl --model student --out OUT", "bad.jsonl:1: field 'prompt' is missing"),
    ("score data.jsonl --model student --max_length 3 --out OUT", "max_length = 3"),
    ("score data.jsonl --model student --metric consensus=x --out OUT", "agreement"),
    ("compare zoo-a --stage x --out OUT", "choose from"),
    ("compare zoo-a --problems 0 --out OUT", "--problems must be a number above 0"),
    ("graph data.jsonl --out OUT", "data.jsonl: expected a saved graph"),
    ("import bad.jsonl --out OUT", "bad.jsonl:1: field 'prompt'"),
    ("compare zoo-a --epochs nan --out OUT", "--epochs must be a number above 0, got nan"),
    ("doctor student --max_length 0", "--max_length must be a number of at least 1"),
    ("doctor", "required: MODEL"),
    ("env x", "unknown argument 'x'"),
    ("import bad.jsonl --outt OUT", "unknown argument '--outt'; did you mean --out? (see"),
    ("import bad.jsonl --out OUT --test-share .5", "--test_share needs --test_out"),
    ("train recipe.yaml", "recipe.yaml'; a recipe is --config "),
    ("nope", "got 'nope'"),
    # presets and teachers
    ("score data.jsonl --model student --preset best --out OUT", "robust"),
    ("score data.jsonl --model student --preset single:nobody --out OUT", "teachers are good"),
    (
        "compare data.jsonl --config recipe.yaml --test questions.jsonl --arms best --out OUT",
        "robust",
    ),
    (
        "compare data.jsonl --config recipe.yaml --test questions.jsonl --seeds 0 "
        "--arms single:nobody --out OUT",
        "'nobody'",
    ),
    # a model that cannot be read
    ("doctor empty", "empty"),
    ("doctor no-config", "no-config"),
    ("doctor truncated", "truncated"),
    ("doctor broken.gguf", "broken.gguf"),
    ("doctor no/such/folder", "no/such/folder"),
    ("evaluate --model broken.gguf --data questions.jsonl --out OUT", "broken.gguf"),
    ("score data.jsonl --model truncated --out OUT", "truncated"),
    ("train --model no-config --data data.jsonl --output_dir OUT --use_cpu", "no-config"),
]


@pytest.mark.parametrize("argv,words", BAD)
def test_bad_input(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, argv: str, words: str
) -> None:
    """One line that says what was wrong."""
    assert words in fails(capsys, *filled(argv, place, tmp_path / "out"))


WRITERS = [
    "train --config recipe.yaml --output_dir OUT",
    "evaluate --model student --data questions.jsonl --max_new_tokens 2 --out OUT",
    "score data.jsonl --model student --out OUT",
    "compare data.jsonl --config recipe.yaml --test questions.jsonl --arms uniform --seeds 0 "
    "--out OUT",
    "report run --problems 0 --out OUT",
    "import data.jsonl --out OUT",
]


@pytest.mark.parametrize("argv", WRITERS, ids=lambda argv: argv.split()[0])
def test_disk_that_takes_no_more(
    capsys: pytest.CaptureFixture[str], place: Path, tmp_path: Path, argv: str
) -> None:
    """No file may grow beyond 50 bytes, as with a quota that is used up."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        line = fails(capsys, *filled(argv, place, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in line or "could not be written" in line


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_full_disk_under_what_is_written_and_printed(place: Path) -> None:
    """A file, and standard output, that report that no space is left."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "compact", "env"], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 1
    assert done.stderr.decode() == "compact: error: No space left on device\n"
    argv = ["import", str(place / "data.jsonl"), "--out", "/dev/full"]
    done = subprocess.run([sys.executable, "-m", "compact", *argv], stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.decode() == "compact: error: /dev/full: No space left on device\n"


INTERRUPTED = {
    "train --config recipe.yaml --output_dir OUT": "compact.commands.train.load_problems",
    "evaluate --model student --data questions.jsonl --out OUT": (
        "compact.evaluation.evaluate.generate"
    ),
    "score data.jsonl --model student --out OUT": "compact.evaluation.score.observe",
    WRITERS[3]: "compact.evaluation.compare.run_arm",
    "report run --out OUT": "compact.commands.report.render",
    "import data.jsonl --out OUT": "compact.commands.import_.import_files",
    "doctor student": "compact.commands.doctor.describe",
    "env": "compact.commands.env._version",
}


@pytest.mark.parametrize("argv", INTERRUPTED, ids=lambda argv: argv.split()[0])
def test_interrupted(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: Path,
    tmp_path: Path,
    argv: str,
) -> None:
    """SIGINT in the middle of each command: one line, status 130."""

    def interrupted(*args: object, **kwargs: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(INTERRUPTED[argv], interrupted)
    assert main(filled(argv, place, tmp_path / "out")) == 130
    errors = capsys.readouterr().err.splitlines()
    assert [line for line in errors if "error" in line] == ["compact: error: interrupted"]
    assert not any("Traceback" in line for line in errors)


def test_ctrl_c_at_a_training_run_says_where_to_go_on(place: Path, tmp_path: Path) -> None:
    """A real process and signal: the newest checkpoint is complete and training resumes from it."""
    run = tmp_path / "run"
    argv = ["train", "--config", str(place / "recipe.yaml"), "--output_dir", str(run)]
    argv += ["--save_steps", "1", "--max_steps"]
    process = subprocess.Popen(
        [sys.executable, "-m", "compact", *argv, "100000"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoint-2").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    checkpoint, damaged = newest_whole(run)
    assert checkpoint is not None and not damaged
    assert stderr.splitlines()[-1] == (
        f"compact: error: interrupted; {checkpoint} is complete: "
        "resume with --resume_from_checkpoint true"
    )
    assert "Traceback" not in stderr
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    step = int(checkpoint.name.rpartition("-")[2])
    assert main([*argv, str(step + 1), "--resume_from_checkpoint", "true"]) == 0
    assert (run / f"checkpoint-{step + 1}").exists()


@pytest.fixture
def adapter(place: Path, tmp_path: Path) -> Path:
    """A folder with LoRA matrices for the place's student."""
    model, _ = load_student(place / "student")
    model = get_peft_model(model, LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folder_with_an_adapter_is_a_model(
    place: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command that reads a student also reads the folder of a run."""
    assert main(["doctor", str(adapter)]) == 0
    assert "layout" in capsys.readouterr().out
    scores = []
    for name in (place / "student", adapter):
        out = tmp_path / f"{name.name}.jsonl"
        words = ["score", str(place / "data.jsonl"), "--model", str(name), "--out", str(out)]
        assert main(words) == 0
        scores.append([json.loads(line) for line in out.read_text().splitlines()])
    assert len(scores[0]) == len(scores[1]) > 0
    assert scores[0] != scores[1]


def test_an_adapter_brings_the_tokenizer_it_was_trained_with(place: Path, adapter: Path) -> None:
    _, tokenizer = load_student(place / "student")
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(adapter)
    assert load_student(adapter)[1].chat_template == tokenizer.chat_template


def test_every_linear_layer_by_one_word(place: Path, tmp_path: Path) -> None:
    command = ["train", "--config", str(place / "recipe.yaml"), "--output_dir", str(tmp_path / "r")]
    command += ["--use_peft", "true", "--lora_target_modules", "all-linear", "--max_steps", "1"]
    assert main(command) == 0
    assert any(
        ".gate_proj." in name for name in load_file(tmp_path / "r/adapter_model.safetensors")
    )


def test_evaluation_data_are_evaluated(place: Path, tmp_path: Path) -> None:
    command = ["train", "--config", str(place / "recipe.yaml"), "--output_dir", str(tmp_path / "r")]
    assert main([*command, "--eval_data", str(place / "data.jsonl")]) == 0
    log = json.loads((tmp_path / "r" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in log)


def test_an_adapter_is_trained_on(
    place: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Training continues from these matrices, and the run names the same student."""
    command = ["train", "--config", str(place / "recipe.yaml"), "--max_steps", "1"]
    command += ["--model", str(adapter), "--output_dir", str(tmp_path / "on")]
    assert main(command) == 1  # the recipe trains every weight
    assert "use_peft must be true with" in capsys.readouterr().err
    assert main([*command, "--use_peft", "true", "--learning_rate", "1e-3"]) == 0
    assert "continues its adapter" in caplog.text and "layout: tree (" in caplog.text
    assert json.loads((tmp_path / "on" / "run.json").read_text())["student"] == str(
        place / "student"
    )
    before, after = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "on")
    )
    assert before.keys() == after.keys()
    moved = [(after[name] - before[name]).abs().max() for name in before]
    assert 0 < max(moved) < 0.01  # one step of AdamW
    model, _ = load_student(tmp_path / "on")
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="peft_config must be None with a model that has adapters"):
        CompactTrainer(
            tmp_path / "on", CompactConfig(use_cpu=True), peft_config=peft_config(RecipeConfig())
        )


def test_arms_start_from_a_trained_student(
    place: Path, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = (place / "recipe.yaml").read_text().replace("use_peft: false", "use_peft: true")
    (tmp_path / "recipe.yaml").write_text(recipe + "overrides: '{tau: 0.5}'\n")
    command = ["compare", str(place / "data.jsonl"), "--config", str(tmp_path / "recipe.yaml")]
    command += ["--test", str(place / "questions.jsonl"), "--arms", "uniform", "--seeds", "0"]
    command += ["--model", str(adapter), "--out", str(tmp_path / "compared")]
    assert main([*command, "--limit", "1"]) == 0
    assert "recipe.yaml: its overrides are not used" in caplog.text
