"""Two tiers: what `pytest` runs before a commit, and the rest, which `.ci/run` adds.

What belongs to the rest has a marker that says why: `pytest -m levels` runs one kind. What is named on the
command line, or selected by -m or -k, runs whichever tier it is in.
"""

from __future__ import annotations

import re

import pytest

# Marker -> (why, patterns of node ids).
REST: dict[str, tuple[str, tuple[str, ...]]] = {
    "emulated": (
        "cards and their stacks, played by Python",
        (
            r"tests/backends/emulation/",
            r"tests/backends/any_device/test_command_line",
            r"tests/backends/kernels/test_conformance",
            r"tests/backends/kernels/test_torch_varlen.py::test_the_suite",
        ),
    ),
    "triton": (
        "kernels that Triton interprets, or compiles for cards that are not here",
        (r"tests/backends/triton/", r"tests/compiled_kernels/"),
    ),
    "mutants": (
        "wrong ops, and right ones in other forms, by the hundred",
        (
            r"tests/conformance/test_(\w+_mutants|right_\w+|pytest_suite)",
            r"tests/frozen/test_(wrong|commands)",
            r"tests/verify/test_right_forms",
        ),
    ),
    "adversary": (
        "devices and plugins that cheat, in whole runs that wait by design, and fuzzers",
        (
            r"tests/fuzz/",
            r"tests/bench/run/test_watchdog",
            r"tests/bench/opponents/",
            r"tests/bench/subjects/test_op_calls.py::test_a_remembered",
        ),
    ),
    "ranks": (
        "several processes that meet, and die",
        (r"tests/bench/ranks/test_(faults|agreement|doubts)\.", r"tests/parallel/test_ranks"),
    ),
    "models": (
        "models of transformers, and checkpoints of their size",
        (r"tests/integrations/", r"tests/checkpoint/test_memory", r"tests/bench/cli/test_model_path"),
    ),
    "rivals": (
        "what measures other implementations, or a card for hours",
        (r"tests/gpu_campaign/", r"tests/peers/"),
    ),
    "builds": (
        "wheels, environments of their own, pictures and pages in a browser",
        (
            r"tests/project/test_(installed|wheels|packaging)",
            r"tests/site/",
            r"tests/bench/report/test_(page|pictures|browser)",
            r"tests/bench/scaffold/",
            r"plugins/cpu/tests/test_native_(wheel|memory)",
        ),
    ),
    "processes": (
        "commands in processes of their own: killed, closed, full, installed beside odd plugins",
        (
            r"tests/bench/cli/test_(process|backend_choice|batch_spec|run|odd_plugins|plugin_boundary)",
            r"tests/bench/doctor/",
            r"tests/bench/run/test_resume",
            r"plugins/cpu/tests/test_native_process",
            r"plugins/cpu/tests/test_cpu.py::test_threads_are_the_least",
        ),
    ),
}
# One real path through each of those rooms is in the tier of everybody.
EVERYDAY: tuple[str, ...] = (
    r"tests/frozen/test_wrong.py::test_(none_was|every_row)",
    r"tests/backends/triton/test_interpreted.py::test_(every_file|triton_that)",
    r"tests/fuzz/test_(options|cache)",
    r"tests/gpu_campaign/test_sections",
    r"tests/peers/test_run.py::test_(the|memory|workloads)",
    r"tests/bench/scaffold/test_new_backend.py::test_a",
    r"tests/backends/emulation/test_process.py::test_the_command_line_writes_a_checked_result",
    r"tests/bench/opponents/test_late.py::test_a_device_clock",
    r"tests/parallel/test_ranks.py::test_every_layout_equals_one_device\[2\]",
    r"tests/integrations/test_ways.py::test_tokens_are_the_same_on_every_cache\[.*-greedy",
    r"tests/bench/report/test_page.py::test_a_(rich|wrong|doubtful)",
    r"tests/bench/report/test_browser.py::test_everything_is_in_the_rendered_page",
    r"tests/bench/scaffold/test_newcomer.py::test_(a_run_is_right_and_uses_the_op|its_own_tests_pass)",
    r"tests/bench/cli/test_process.py::test_(a_closed_stdout_is_told|ctrl_c_keeps)",
    r"tests/bench/cli/test_run.py::test_(a_|an_|code|impl|list)",
    r"tests/bench/cli/test_(plugin_boundary|odd_plugins|batch_spec).py::test_(a_plugin|an_op|a_spec|an_option|a_misspelt)",
    r"tests/bench/doctor/test_diagnosis.py::test_json",
)


def marker_of(nodeid: str) -> str | None:
    """Return the marker that puts a test into the rest; None for one that everybody runs."""
    if any(re.match(pattern, nodeid) for pattern in EVERYDAY):
        return None
    for marker, (_, patterns) in REST.items():
        if any(re.match(pattern, nodeid) for pattern in patterns):
            return marker
    return None


def choose(config: pytest.Config) -> None:
    """Register the markers, and leave the rest out unless the command line selects tests."""
    config.addinivalue_line("markers", "rest: left to .ci/run; the union of the markers below")
    for marker, (why, _) in REST.items():
        config.addinivalue_line("markers", f"{marker}: {why}")
    named = config.args_source is pytest.Config.ArgsSource.ARGS
    if not (named or config.option.markexpr or config.option.keyword):
        config.option.markexpr = "not rest"


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give tests of the rest their markers."""
    for item in items:
        if marker := marker_of(item.nodeid):
            item.add_marker(marker)
            item.add_marker("rest")


def header(config: pytest.Config) -> str | None:
    """Say which tests are left out."""
    if config.option.markexpr == "not rest":
        return "tier: before a commit; `pytest -m rest` runs the rest, as .ci/run does (`pytest --markers`)"
    return None
