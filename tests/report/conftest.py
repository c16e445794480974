"""A run folder as training and evaluation leave it, and a real browser to open its report in."""

import fcntl
import json
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from compact.lab import zoo
from compact.lab.zoo_student import build_model, build_tokenizer
from compact.trainer.runlog import ScoreLog

TEACHERS = ("good", "verbose", "wrong-step", "<unrelated & odd>")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """Sixty steps of four teachers on twelve problems, a saved student, evaluations and arms."""
    run = tmp_path_factory.mktemp("runs") / "zoo-run"
    rows = zoo.make_rows(("good", "verbose", "wrong-step", "unrelated"), 12, seed=4)
    for row in rows:
        row["teacher"] = TEACHERS[-1] if row["teacher"] == "unrelated" else row["teacher"]
    data = run.parent / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_scores(run, rows)
    history = [{"step": s, "loss": 2.0 / (1 + s / 10), "epoch": s / 12} for s in range(1, 61)]
    history += [{"step": s, "eval_loss": 1.5 / (1 + s / 10), "epoch": s / 12} for s in (20, 40, 60)]
    history += [{"step": 60, "eval_gold_logp": -1.0}, {"step": 40, "eval_gold_logp": float("nan")}]
    (run / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    info = {"student": "zoo/late", "data": str(data), "weigher": "robust", "status": "complete"}
    info |= {"settings": {"max_length": 400, "learning_rate": 1e-4, "seed": 42}}
    info |= {"command": "compact train --data <x>"}
    (run / "run.json").write_text(json.dumps(info))
    write_evaluation(run, "before", 0.2)
    text = {"data": "old.txt", "tokens": 9, "base_perplexity": 8.5, "student_perplexity": 9.25}
    task = {"base_accuracy": 0.5, "student_accuracy": 0.4, "drop": 0.1}
    task |= {"drop_low": -0.05, "drop_high": 0.25}
    found = {"text": text | {"kl": 0.0321}, "tasks": {"old-task.jsonl": task}}
    found["answers"] = text | {"data": "test.jsonl (own answers)", "kl": 0.4}
    states = {"text": [1.0, 0.99, 0.9], "answers": [1.0, 0.95, 0.8]}
    found["layers"] = {"moved": [0.01, 0.02], "states": states}
    write_evaluation(run, "after", 0.45, forgetting=found)
    (run / "halted.summary.json").write_text(json.dumps({"settings": {}, "status": "running"}))
    (run / "compare.json").write_text(json.dumps(make_arms()))
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0, layers=2).save_pretrained(run)
    tokenizer.save_pretrained(run)
    return run


def write_scores(run, rows):
    rng = random.Random(0)
    log = ScoreLog(run)
    questions = sorted({row["question_id"] for row in rows})
    mean = dict(zip(TEACHERS, (0.4, 0.45, 0.1, 0.05), strict=True))
    for step in range(1, 61):
        question = questions[step % len(questions)]
        noise = {t: w * rng.uniform(0.5, 1.5) for t, w in mean.items()}
        log.append(
            [
                {
                    "step": step,
                    "epoch": step / 12,
                    "question_id": question,
                    "teacher": t,
                    "tokens": 40,
                    "weight": noise[t] / sum(noise.values()),
                    "nll": 1.0 - w + 1 / step,
                    "adaptability": w,
                    "consensus": w,
                    "difficulty": 1 - w,
                    "z_adaptability": rng.gauss(w, 0.3),
                    "z_consensus": rng.gauss(w, 0.3),
                    "z_difficulty": rng.gauss(-w, 0.3),
                    "validity": float(t in ("good", "verbose")),
                }
                for t, w in mean.items()
            ]
        )
    log.close()


def write_evaluation(run, name, accuracy, **more):
    summary = {"settings": {}, "status": "complete", "items": 100, "correct": round(100 * accuracy)}
    summary |= {"accuracy": accuracy, "ci_low": accuracy - 0.08, "ci_high": accuracy + 0.08}
    (run / f"{name}.summary.json").write_text(json.dumps(summary | more))


def make_arms():
    arms = []
    for name, mean in (("uniform", 0.11), ("robust", 0.53), ("oracle", 0.61)):
        arm = {"name": name, "seeds": [0, 1], "values": [mean - 0.02, mean + 0.02]}
        arm |= {
            "mean": mean,
            "ci_low": mean - 0.05,
            "ci_high": mean + 0.05,
            "tokens": 12345,
            "steps": 60,
        }
        arm |= {"weights": {"good": 0.75, "wrong-step": 0.25}}
        arm |= {"right_weight": 0.5, "right_weight_low": 0.4, "right_weight_high": 0.6}
        if name != "uniform":
            arm |= {"gain": mean - 0.11, "gain_low": 0.1, "gain_high": 0.6}
        arms.append(arm | {"seconds": 1.0})
    return {"data": "zoo-b", "metric": "accuracy", "token_budget": 12345, "arms": arms}


@pytest.fixture(scope="session")
def chromium():
    """Debian's chromium; it is installed if it is missing and this is possible."""
    with open(Path(tempfile.gettempdir()) / "compact-chromium.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the workers of pytest-xdist must not install at once
        if shutil.which("chromium") is None and os.geteuid() == 0 and shutil.which("apt-get"):
            subprocess.run(["apt-get", "update", "-qq"], check=False, timeout=300)
            subprocess.run(
                ["apt-get", "install", "-y", "-qq", "chromium"], check=False, timeout=600
            )
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("the report is tested in a real browser: apt-get install chromium")
    return path


@pytest.fixture
def browse(chromium, tmp_path):
    """Opens a page in headless chromium at a width and returns its standard output."""

    def open_page(page, *options, width):
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"]
        command += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
        command += ["--disable-component-update", "--hide-scrollbars"]
        command += [f"--user-data-dir={tmp_path / f'profile-{width}'}"]
        command += [f"--window-size={width},1000", *options, page.as_uri()]
        done = subprocess.run(command, capture_output=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        return done.stdout.decode()

    return open_page
