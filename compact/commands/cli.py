"""The `compact` command: finds the subcommand's module, runs it, and turns errors into one line."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from compact.registry import import_modules, unknown

# Subcommand -> (module, what it does). A module is imported when its command is used.
COMMANDS = {
    "train": ("compact.commands.train", "train a student on the rationales of several teachers"),
    "evaluate": (
        "compact.commands.evaluate",
        "accuracy of a student on a test file, and what it forgot",
    ),
    "score": ("compact.commands.score", "score and weigh rationales without training"),
    "graph": ("compact.commands.graph", "draw the consensus graph of a problem"),
    "compare": ("compact.commands.compare", "train under several weightings and compare"),
    "report": ("compact.commands.report", "one HTML page about a run"),
    "import": ("compact.commands.import_", "turn files of other tools into rationales"),
    "planted": ("compact.commands.planted", "make teachers of a file mislead, for trying out"),
    "discrimination": (
        "compact.commands.discrimination",
        "which scores tell right rationales from wrong ones",
    ),
    "metrics": ("compact.commands.metrics", "list metrics, presets, policies and answer domains"),
    "strategies": ("compact.commands.strategies", "list distillation methods and what they need"),
    "demo": ("compact.commands.demo", "four teachers, one of which misleads, in 5 minutes"),
    "doctor": ("compact.commands.doctor", "what layout, attention and memory a model gets"),
    "env": ("compact.commands.env", "versions and machine, for a bug report"),
}
_INTERRUPTED = 130
# Set for the processes that `compact train --num_processes` starts, which prints their errors.
REPORT_TO_LAUNCHER = "COMPACT_REPORT_TO_LAUNCHER"


def ignore_library_warnings() -> None:
    """Silences library warnings that users cannot act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # about transformers' own code
    warnings.filterwarnings("ignore", message="Could not find a config file")  # a GGUF has none


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a `compact` command line; returns its exit status.

    0 success, 1 an error that the user can mend (one line on standard error), 2 a command line that
    cannot be read, 130 interrupted. Any other error is a defect of COMPACT and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Only the first of several processes prints.
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        format="compact: %(message)s", level=logging.WARNING if first else logging.ERROR
    )
    logging.getLogger("compact").setLevel(logging.INFO if first else logging.ERROR)
    ignore_library_warnings()
    try:
        status = _run(arguments)
        sys.stdout.flush()  # a full disk is reported here, not by Python at its end
        return status
    except KeyboardInterrupt as interrupt:
        return _fail(f"interrupted; {interrupt}" if str(interrupt) else "interrupted", _INTERRUPTED)
    except BrokenPipeError:
        _drop_output()
        return 1
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("COMPACT_TRACEBACK"):
            raise
        if isinstance(error, OSError):
            _drop_output()
        return _fail(_one_line(error), 1)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    arguments, modules = _without_imports(arguments)
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return _fail(unknown("command", command, list(COMMANDS)), 2)
    module_name, what = COMMANDS[command]
    import_modules(modules)
    module = importlib.import_module(module_name)
    parser = _Parser(prog=f"compact {command}", description=what, allow_abbrev=False)
    module.add_arguments(parser)
    args, options = parser.parse_known_args(rest)
    if command == "train":
        args.options = options  # keys of the recipe
    elif options:
        parser.error(f"unknown argument {options[0]!r}")
    return int(module.run(args))


def _without_imports(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments without `--import MODULE`, which every command takes, and the modules."""
    rest, modules = [], []
    left = iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name == "--import":
            value = value if equals else next(left, "")
            if not value or value.startswith("-"):
                raise ValueError("--import must name a module, as in --import my_module")
            modules.append(value)
        else:
            rest.append(argument)
    if not rest:
        raise ValueError("--import must stand with a command")
    return rest, modules


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line in the one line that all errors have."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Prints one line and exits with status 2."""
        sys.exit(_fail(f"{message} (see {self.prog} --help)", 2))


def _overview() -> str:
    lines = [f"  {name:<14} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: compact COMMAND ...",
            "",
            "Distils the reasoning of several teachers into one small student, weighing every "
            "teacher\nproblem by problem.",
            "",
            *lines,
            "",
            "example:",
            "  compact train --config recipes/svamp.yaml",
            "  compact COMMAND --help",
            "",
            "every command: --import MODULE makes your own metrics, policies, presets, strategies",
            "and answer domains known (a module on the Python path or in this folder)",
        ]
    )


def _one_line(error: BaseException) -> str:
    """The message of an error, its line breaks folded."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    return " ".join(str(error).split()) or type(error).__name__


def _drop_output() -> None:
    """Discards unwritable standard output, which Python would try to write again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, status: int) -> int:
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and REPORT_TO_LAUNCHER in os.environ:
        error = {"message": {"message": message, "extraInfo": {"timestamp": int(time.time())}}}
        Path(file).write_text(json.dumps(error))
        return status
    print(f"compact: error: {message}", file=sys.stderr, flush=True)
    return status
