"""The `compact` command: finds the subcommand's module, runs it, and turns errors into one line."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from compact import __version__
from compact.registry import closest, import_modules, require, unknown

# Subcommand -> (module, what it does). A module is imported when its command is used.
COMMANDS = {
    "train": ("compact.commands.train", "train a student on the rationales of several teachers"),
    "evaluate": (
        "compact.commands.evaluate",
        "measure accuracy on a test file, and forgetting",
    ),
    "score": ("compact.commands.score", "score and weigh rationales without training"),
    "graph": ("compact.commands.graph", "draw the consensus graph of a problem"),
    "compare": ("compact.commands.compare", "train with several weightings and compare them"),
    "report": ("compact.commands.report", "write one HTML page about a run"),
    "collect": (
        "compact.commands.collect",
        "ask several teachers questions, and keep their rationales",
    ),
    "export": ("compact.commands.export", "merge a student's adapter into a folder to serve"),
    "import": ("compact.commands.import_", "convert files of other tools into rationales"),
    "planted": ("compact.commands.planted", "plant errors in rationales, to test a weighting"),
    "metrics": (
        "compact.commands.metrics",
        "list metrics, presets and policies; with data, measure which finds what is right",
    ),
    "strategies": (
        "compact.commands.strategies",
        "list distillation methods and their requirements",
    ),
    "demo": ("compact.commands.demo", "train with four teachers, one of them wrong, in 5 minutes"),
    "docs": ("compact.commands.docs", "print the guides that are installed with the package"),
    "doctor": ("compact.commands.doctor", "show layout, attention and memory for a model"),
    "env": ("compact.commands.env", "show versions and machine, for a bug report"),
}
_DRAW = ("compare", "demo", "graph")
_INTERRUPTED = 130
_OPTION = re.compile(r"^--(\w[\w-]*)")
_STDOUT = re.compile(r"(--\w+=)?(/dev/stdout|/dev/fd/1|/proc/self/fd/1)")
MOST_OF_A_LINE = 1000
"""Most characters of the line about an error; what data hold may be of any length."""
# Set for the processes of `compact train --num_processes`; the launcher prints their errors.
REPORT_TO_LAUNCHER = "COMPACT_REPORT_TO_LAUNCHER"


def ignore_library_warnings() -> None:
    """Silences library warnings that users cannot act on."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # about transformers' own code
    warnings.filterwarnings("ignore", message="Could not find a config file")  # a GGUF has none


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a `compact` command line; returns its exit status.

    0: success. 1: an error that the user can fix (one line on standard error). 2: an invalid
    command line. 130: interrupted. Any other error is a bug in COMPACT and shows its traceback.
    """
    arguments = [_with_underscores(word) for word in (sys.argv[1:] if argv is None else argv)]
    _open_streams()
    # Only the first of several processes prints.
    first = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        format="compact: %(message)s", level=logging.WARNING if first else logging.ERROR
    )
    logging.getLogger("compact").setLevel(logging.INFO if first else logging.ERROR)
    ignore_library_warnings()
    # What a command writes to standard output as a file must not be followed by its own messages.
    told = redirect_stdout(sys.stderr) if any(map(_STDOUT.fullmatch, arguments)) else nullcontext()
    try:
        with told:
            status = _run(arguments)
        sys.stdout.flush()  # report a full disk here, not when Python exits
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
        return _fail(one_line(error), 1)


def _open_streams() -> None:
    """Opens the closed ones of standard input, output and error on the null device.

    Otherwise the next file that is opened takes the place of a stream, and messages go into it.
    Characters that standard output cannot encode are printed as escapes. Otherwise one of them, in
    text of the data, would end a command whose work is done.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments == ["--version"]:
        print(f"compact {__version__}")
        return 0
    arguments, modules = _without_imports(arguments)
    if arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        return _fail(unknown("command", command, list(COMMANDS)), 2)
    module_name, what = COMMANDS[command]
    if sys.flags.optimize > 1:
        raise ImportError("PYTHONOPTIMIZE must be at most 1: the libraries need their docstrings")
    try:
        os.getcwd()  # libraries fail without it, in words of their own
    except OSError as error:
        raise OSError(f"the current folder: {error.strerror}") from None
    if command in _DRAW:  # before the work, not after it
        require("matplotlib", "report", f"compact {command} draws pictures")
    import_modules(modules)
    module = importlib.import_module(module_name)
    parser = _Parser(
        prog=f"compact {command}",
        description=what,
        epilog=module.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    if command != "train":
        _check_options(parser, rest)
    args, options = parser.parse_known_args(rest)
    for name, value in vars(args).items():
        if "" in (value if isinstance(value, list) else [value]):
            parser.error(f"--{name} must not be empty")
    if command == "train":
        args.options = options  # keys of the recipe
    elif options:
        parser.error(f"unknown argument {options[0]!r}")
    return int(module.run(args))


def _with_underscores(word: str) -> str:
    """Returns an option with underscores for the dashes within its name; --test-out=a-b is one."""
    return _OPTION.sub(lambda name: f"--{name[1].replace('-', '_')}", word)


def _check_options(parser: _Parser, words: Sequence[str]) -> None:
    """Refuses an option that does not exist, before argparse misses what it was meant to be."""
    known = ["--help", *re.findall(r"(?<!\w)--\w+", parser.format_help())]
    for word in words:
        name = word.partition("=")[0]
        if _OPTION.match(word) and name not in known:
            near = closest(name, known)
            hint = f"; did you mean {near}?" if near else ""
            parser.error(f"unknown argument {name!r}{hint}")


def _without_imports(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Returns the arguments without `--import MODULE`, and the modules; every command takes it."""
    rest, modules = [], []
    left = iter(arguments)
    for argument in left:
        name, equals, value = argument.partition("=")
        if name == "--import":
            value = value if equals else next(left, "")
            if not value or value.startswith("-"):
                raise ValueError("--import must name a module, as in --import my_module")
            modules += value.split(",")
        else:
            rest.append(argument)
    if not rest:
        raise ValueError("--import must be used with a command")
    return rest, modules


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line in one line, as all errors are."""

    def error(self, message: str) -> None:  # type: ignore[override]
        """Prints one line and exits with status 2."""
        sys.exit(_fail(f"{message} (see {self.prog} --help)", 2))


def _overview() -> str:
    lines = [f"  {name:<14} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: compact COMMAND ...",
            "",
            "Distils the reasoning of several teachers into one small student. Every teacher gets "
            "a\nweight for each problem.",
            "",
            *lines,
            "",
            "example:",
            "  compact train --config recipe.yaml",
            "  compact COMMAND --help",
            "  compact --version",
            "",
            "every command: --import MODULE registers your own metrics, policies, presets,",
            "strategies and answer domains (a module on the Python path or in this folder)",
        ]
    )


def one_line(error: BaseException) -> str:
    """Returns the message of an error, without line breaks and of at most `MOST_OF_A_LINE`."""
    if isinstance(error, FileExistsError) and error.filename:  # of mkdir
        return f"{error.filename}: expected a folder, got a file"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.strerror:
        return str(error.strerror)
    text = str(error)
    if text.startswith("Caught ") and " in DataLoader worker process" in text.partition("\n")[0]:
        # torch puts the worker's traceback before its message.
        text = text.rstrip().rpartition("\n")[2].partition(": ")[2]
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= MOST_OF_A_LINE else text[: MOST_OF_A_LINE - 3] + "..."


def _drop_output() -> None:
    """Discards unwritable standard output; Python would try to write it again at exit."""
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
