"""Everything a user may type wrong: the exit code and the one sentence."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import BashComplete

from mla.bench.cli.main import cli
from mla.command.exit_codes import Exit
from mla.config.presets import PRESETS
from mla.conformance.cli import cli as conformance
from mla.text import DTYPES

Bench = Callable[..., Any]

PRESET_LIST = ", ".join(PRESETS)
IMPLEMENTATIONS = "There are: mla, mla-reference, transformers, transformers-eager."
CPU = ("--backend", "cpu")
COMMON = [
    *("--backend", "--config", "--model-path", "--batch-spec", "--op", "--implementations"),
    *("--threads", "--dtype", "--budget", "--output", "--verbose", "--quiet"),
]


def test_help_has_the_commands_and_the_options_that_most_people_need(bench: Bench) -> None:
    done = bench("--help")
    assert done.code == 0
    assert len(done.out.splitlines()) < 60
    commands, _, options = done.out.partition("What to run:\n")
    assert re.findall(r"^  ([a-z-]+)  ", commands, re.MULTILINE) == list(cli.commands)
    assert re.findall(r"^  (?:-\w, )?(--[a-z-]+)", options, re.MULTILINE) == COMMON
    assert "Everything else: --help-all" in options
    codes = re.findall(r"(?:, |: |by )(\d+) ", " ".join(options.partition("Exit codes")[2].split()))
    assert codes == ["0", "1", "2", "3", "4", "5", "6", "130", "143", "129"]
    assert bench() == done


def test_help_fits_into_80_columns_with_two_lines_an_option(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = bench("--help").out
    assert max(map(len, out.splitlines())) <= 80
    assert re.findall(r"^  -.*\n {20}.*\n {20}.*", out, re.MULTILINE) == []


def test_help_all_names_every_option_by_group_and_every_exit_code(bench: Bench) -> None:
    done = bench("--help-all")
    assert done.code == 0
    for option in cli.commands["run"].params:
        assert all(flag in done.out for flag in option.opts)
    titles = re.findall(r"^([A-Z].*):$", done.out, re.MULTILINE)
    assert titles == ["What to run", "How", "Variants and scale", "Output", "Limits and evidence"]
    lines = map(str.strip, done.out.partition("Exit codes:\n")[2].splitlines())
    codes = [line.split()[0] for line in lines if line[:1].isdigit()]
    elsewhere = (Exit.HUNG_UP, Exit.TERMINATED, Exit.INCOMPLETE)  # another line; the conformance command's
    assert codes == [str(int(code)) for code in Exit if code not in elsewhere]
    assert "143 ended by SIGTERM, 129 by SIGHUP" in done.out
    for words in ("3 backend missing", "the device does not exist", "an op raised", "MLA_SUPERVISE=0"):
        assert words in done.out
    assert bench("run", "--help") == bench("run", "--help-all") == bench("--backend", "cpu", "--help") == done


@pytest.mark.parametrize(
    ("before", "word", "offered"),
    [
        ((), "c", ["ceilings", "compare"]),
        ((), "--mod", ["--model-path", "--mode"]),
        (("--attention",), "a", ["auto", "absorbed"]),
        (("compare", "a.json"), "--noi", ["--noise"]),
    ],
)
def test_a_shell_completes_commands_and_the_options_of_a_run(
    before: tuple[str, ...], word: str, offered: list[str]
) -> None:
    shell = BashComplete(cli, {}, "mla-bench", "_MLA_BENCH_COMPLETE")
    assert [completion.value for completion in shell.get_completions(list(before), word)] == offered


@pytest.mark.parametrize("command", [cli.commands["run"], cli.commands["ceilings"], conformance])
def test_both_names_of_a_dtype_are_one_word(command: click.Command) -> None:
    (option,) = (option for option in command.params if "--dtype" in option.opts)
    for short, long in DTYPES.items():
        read = [option.type.convert(name, option, None) for name in (short, long)]
        assert read == ([[long]] * 2 if command.name == "ceilings" else [long] * 2)


def test_a_script_goes_by_its_own_name(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/mla-bench"])
    assert bench("--help").out.startswith("Usage: mla-bench [COMMAND] [OPTIONS]\n")


def test_every_command_and_option_explains_itself(bench: Bench) -> None:
    for name, command in cli.commands.items():
        assert bench(name, "--help").code == 0
        assert command.help
        assert all(getattr(option, "help", None) for option in command.params)


def test_version_is_that_of_the_package(bench: Bench) -> None:
    import mla

    done = bench("--version")
    assert (done.code, done.out) == (0, f"python -m mla.bench, version {mla.__version__}\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lst"], "Error: unknown command 'lst'. Did you mean 'list'? Commands: "),
        (["benchmark"], "Error: unknown command 'benchmark'. Commands: "),
        (["--bakend", "cpu"], "Error: No such option '--bakend'"),
        (["-x"], "Error: No such option '-x'"),
        ([*CPU, "more"], "Error: Got unexpected extra argument (more)"),
        (["list", "more"], "Error: Got unexpected extra argument (more)"),
        (["-o"], "Error: Option '-o' requires an argument."),
        (["--runs", "0"], "Error: Invalid value for '--runs': 0 is not in the range"),
        (["--threads", "100000"], "Error: Invalid value for '--threads': 100000 is not in the range"),
        (["--seed", "4294967296"], "Error: Invalid value for '--seed': 4294967296 is not in the range"),
        (["--dtype", "fp8"], "Error: Invalid value for '--dtype': unknown dtype 'fp8'. Choose from: bf16, "),
        (["--format", "yaml"], "Error: Invalid value for '--format': 'yaml' is not one of"),
        (["--attention", "flash"], "Error: Invalid value for '--attention': 'flash' is not one of"),
        (["--ops", "fusedd"], "error: unknown op 'fusedd'. Did you mean 'fused'?"),
        (["--config", "\udcff"], r"Error: argument '\udcff' is not valid UTF-8, or not in"),
    ],
)
def test_a_bad_command_line_is_refused(bench: Bench, words: list[str], message: str) -> None:
    done = bench(*words)
    assert done.code == 2
    assert done.out == ""
    assert done.error.startswith(message)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--backend", "CPU"], 3, "unknown backend 'CPU' (did you mean 'cpu'?); installed: "),
        (["--backend", "cuda"], 3, "unknown backend 'cuda' (did you mean 'nvidia'?); installed: "),
        (["--backend", ""], 3, "unknown backend ''; installed: "),
        (
            ["--backend", "nowhere:x"],
            3,
            "backend 'nowhere:x' failed to load: module nowhere cannot be imported: no such module; "
            "check the spelling, run from the folder it is in, or put that folder on PYTHONPATH.",
        ),
        (["--backend", "os:nothing"], 3, "backend 'os:nothing' failed to load: module os has no attribute"),
        (["--backend", "os:path"], 3, "backend 'os:path' failed to load: module os has no hook; "),
        ([*CPU, "--device", "5"], 3, "backend 'cpu' has no device 5: it has 1, numbered from 0."),
        ([*CPU, "-O", "x=1"], 2, "backend 'cpu' has no option 'x'; it knows: threads"),
        ([*CPU, "-O", "threads=two"], 2, "backend 'cpu' needs 1 to 4096 threads, got 'two'."),
        ([*CPU, "-O", "native=maybe"], 2, "backend 'cpu' takes -O native=auto, off, "),
        (
            [*CPU, "--config", "deepseek-r2"],
            2,
            f"unknown config 'deepseek-r2'. Did you mean 'deepseek-v2'? Presets: {PRESET_LIST}.",
        ),
        ([*CPU, "--config", "my.json"], 2, "cannot read config 'my.json': No such file or directory."),
        ([*CPU, "--config", "."], 2, "cannot read config 'config.json': No such file or directory."),
        ([*CPU, "--page-size", "0"], 2, "--page-size must be a power of two below 2^31, got 0."),
        ([*CPU, "--page-size", "48"], 2, "--page-size must be a power of two below 2^31, got 48."),
        ([*CPU, "--implementations", "mla,mla_"], 2, "unknown implementation 'mla_'. Did you mean 'mla'? "),
        ([*CPU, "--implementations", "vllm"], 2, f"unknown implementation 'vllm'. {IMPLEMENTATIONS}"),
        (["--scenario", "decod"], 2, "unknown scenario 'decod'. Did you mean 'decode'? This workload has: "),
        (["--workload", "no.toml"], 2, "cannot read workload 'no.toml': No such file or directory."),
        (["-o", "no/run.json"], 2, "cannot write 'no/run.json': there is no folder 'no'."),
        (["-o", "."], 2, "cannot write '.': it is a folder."),
        (["--model-path", "."], 2, "cannot read config 'config.json': No such file or directory."),
        (["--model-path", "no"], 2, "--model-path 'no' does not exist: it takes a folder with config.json "),
        (["--model-path", ".", "--config", "deepseek-r1"], 2, "--config and --model-path are mutually exclu"),
    ],
)
def test_a_mistake_gets_its_sentence(bench: Bench, words: list[str], code: int, message: str) -> None:
    done = bench(*words)
    assert done.code == code
    assert done.out == ""
    assert done.error.startswith(f"error: {message}")
    assert not any("backend    " in line for line in done.err.splitlines()), (
        "refused before a plan is printed"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid JSON: "),
        ("{}", "has no hidden_size, so it does not describe an MLA layer."),
        ('{"hidden_size": 0', "hidden_size must be an integer of at least 1, got 0."),
    ],
)
def test_a_bad_config_file_gets_its_sentence(bench: Bench, small: list[str], text: str, message: str) -> None:
    if text.startswith('{"'):  # a change of the tiny config
        text = json.dumps({**json.loads(Path("tiny.json").read_text()), **json.loads(text + "}")})
    Path("bad.json").write_text(text)
    done = bench(*CPU, "--config", "bad.json")
    assert done.code == 2
    assert done.error.startswith("error: config 'bad.json'")
    assert message in done.error


def test_a_known_backend_that_is_not_installed_says_how_to_install_it(isolated: Bench) -> None:
    done = isolated("--backend", "metax")
    assert done.code == 3
    assert done.err == (
        "error: backend 'metax' is not installed: run `pip install . ./backends ./plugins/metax` in a "
        "checkout (once released, `pip install mla-backend-metax`), with torch from MetaX's own wheel "
        "index for the MACA SDK (its version contains +metax).\n"
    )


def test_a_dtype_the_device_does_not_compute_is_refused(bench: Bench, small: list[str]) -> None:
    device = ("--backend", "fake-float32-only")
    done = bench(*device, *small, "--dry-run", fakes=["float32_only"])
    assert done.code == 2
    assert done.err == (
        "error: backend 'fake-float32-only' does not compute bfloat16 natively; "
        "choose --dtype from: float32.\n"
    )
    assert bench(*device, *small, "--dry-run", "--dtype", "float32").code == 0


def test_a_locale_without_utf8_is_not_blamed_on_the_argument(process: Bench) -> None:
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = process("show", "b\u00fcro.json", **locale)
    assert done.code == 2
    assert done.error.endswith("is not valid UTF-8, or not in this locale (LC_ALL).")
