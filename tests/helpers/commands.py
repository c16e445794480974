"""Running a command in the test's process."""

import argparse
import importlib

import pytest

from compact.commands.cli import COMMANDS, main


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must fail; its one line of error."""
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main(list(argv)))
    assert stop.value.code not in (0, None)
    lines = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "\n".join(lines)
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1, lines
    return errors[0]


def run(name: str, *words: object) -> int:
    """Runs a command's own function, so that what it raises reaches the test."""
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser(prog=f"compact {name}")
    module.add_arguments(parser)
    return module.run(parser.parse_args([str(word) for word in words]))
