"""Installs a wheel into a fresh environment and runs the commands in it, away from the checkout.

tools/smoke_wheel.py WHEEL [--backend native|reference] [--quick]

The environment is a new venv that finds the packages of the Python that runs this file, because
installing torch takes minutes. COMPACT itself comes from the wheel. --quick runs two commands only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

# Run in the new environment: a student of two layers and rationales of two teachers.
MAKE = """
import json
from pathlib import Path
import compact, compact_ops
from compact.lab.zoo import make_rows
from compact.lab.zoo_student import build_model, build_tokenizer
tokenizer = build_tokenizer()
tokenizer.save_pretrained("student")
build_model(tokenizer, seed=0, layers=2).save_pretrained("student")
rows = make_rows(("good", "wrong-step"), 4, seed=1)
Path("data.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
print(json.dumps([compact.__file__, compact_ops.__file__, compact_ops.about_backend()]))
"""
TRAIN = "--data data.jsonl --max_steps 2 --learning_rate 1e-3 --logging_steps 1 --report_to none"
COMMANDS = (
    "env",
    f"train --model student {TRAIN} --output_dir run --preset robust",
    f"train --model student {TRAIN} --output_dir adapter --preset paper --use_peft true",
    "evaluate --model run --data data.jsonl --out run/evaluate.jsonl --max_new_tokens 8",
    "score data.jsonl --model student --preset paper --graphs graphs --out scores.jsonl",
    "graph graphs/GRAPH --out graph.svg",
    "export --model adapter --out merged",
    "report run",
)


def main() -> int:
    """Returns 0 if every command succeeds with the backend that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--backend", choices=("native", "reference"), default="native")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home = Path(name).resolve()
        python = _environment(home / "venv", args.wheel.resolve())
        work = home / "work"
        work.mkdir()
        made = _run(work, [python, "-c", MAKE])
        *files, about = json.loads(made.stdout.splitlines()[-1])
        assert all(Path(file).is_relative_to(home) for file in files), files
        assert about.startswith(args.backend), about
        warned = made.stderr.count("plain torch, slow")
        assert warned == (args.backend == "reference"), made.stderr
        for command in COMMANDS[:2] if args.quick else COMMANDS:
            words = command.replace("GRAPH", _first(work / "graphs")).split()
            done = _run(work, [python.with_name("compact"), *words])
            assert words != ["env"] or about in done.stdout, done.stdout
            print("ok: compact", *words, flush=True)
    print(f"smoke test passed: {args.wheel.name}, operators {about}")
    return 0


def _environment(folder: Path, wheel: Path) -> Path:
    """Returns the Python of a new environment with the wheel and this Python's packages."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    # A folder in a .pth file is searched, but the .pth files in it, such as that of an editable
    # COMPACT, are not read.
    (site,) = (folder / "lib").glob("python*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--force-reinstall"]
    _run(folder, [*install, wheel])
    return python


def _run(cwd: Path, command: list[object]) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "COMPACT_OPS_BACKEND")}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)[:200]}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def _first(folder: Path) -> str:
    return min((path.name for path in folder.glob("*.json")), default="")


if __name__ == "__main__":
    sys.exit(main())
