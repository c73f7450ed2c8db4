"""What a campaign would run: every command with its limit, and whether its options parse."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.gpu.ask import ask
from benchmarks.gpu.child import GRACE
from benchmarks.gpu.steps import Machine, Section, Step
from benchmarks.gpu.tune import tune
from mla.bench.cli import main as bench
from mla.command import console
from mla.conformance import cli as conformance

# Module after `-m`, or file of a program -> the click command that parses its words.
PARSERS: dict[str, click.Command] = {
    "mla.bench": bench.cli,
    "mla.conformance": conformance.cli,
    "rivals.py": bench.cli,
    "tune.py": tune,
    "ask.py": ask,
}


def shell_line(words: Sequence[str], seconds: int) -> str:
    """Return a command with its limit as a line for a shell."""
    return shlex.join(["timeout", "-k", f"{GRACE:.0f}", str(seconds), "python", *words[1:]])


def dry_run(machine: Machine, wanted: Sequence[Section], folder: Path) -> int:
    """Print all commands, and return how many of them are wrong."""
    wrong = 0
    for section in wanted:
        console.out(f"\n# {section.name}: {section.title}, at most {section.limit} s\n")
        if not section.serves(machine.backend):
            console.out(f"# skipped: it is about {', '.join(sorted(section.backends))} only\n")
            continue
        for step in section.steps:
            result = step.result(folder / section.name, machine.stem)
            words = step.command(result, step.limit, resume=False)
            console.out(f"{shell_line([sys.executable, *words], step.limit)}\n")
            if fault := _fault(step, words, machine):
                wrong += 1
                console.out(f"# wrong: {fault}\n")
    return wrong


def _fault(step: Step, words: Sequence[str], machine: Machine) -> str:
    """Return what is wrong with a command; "" if nothing is found."""
    module = words[0] == "-m"
    if not module and not Path(words[0]).is_file():
        return f"there is no file {words[0]}"
    name, rest = (words[1], words[2:]) if module else (Path(words[0]).name, words[1:])
    return _unparsed(name, rest) or _refused(step, words, machine)


def _unparsed(program: str, words: Sequence[str]) -> str:
    """Return the click error of a command line; "" if it parses."""
    command = PARSERS[program]
    rest = _without_files(words)  # the folder of results does not exist yet
    if isinstance(command, click.Group):
        named = bool(rest) and rest[0] in command.commands
        default = "run"  # of the runner, and no command of another program
        command, rest = command.commands[rest[0] if named else default], rest[named:]
    try:
        command.make_context(program, rest)
    except click.ClickException as error:
        return error.format_message()
    return ""


def _without_files(words: Sequence[str]) -> list[str]:
    flags = ("-o", "--report", "--profile")
    at = {number + step for number, word in enumerate(words) if word in flags for step in (0, 1)}
    return [word for number, word in enumerate(words) if number not in at]


def _refused(step: Step, words: Sequence[str], machine: Machine) -> str:
    """Return the sentence of the runner's own --dry-run, where there is a device to ask; "" if it agrees."""
    if step.kind != "run" or not machine.usable:
        return ""
    command = [sys.executable, *_without_files(words), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    lines = done.stderr.splitlines()
    return lines[-1] if done.returncode and "refused" not in step.tolerates and lines else ""
