"""What users read: one golden message per state a backend can be in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mla_backends import errors
from mla_backends.any_device import AnyDevice
from mla_backends.known import KNOWN, WITHOUT_PLUGIN
from mla_backends.probe import USABLE

GOLDEN = Path(__file__).parent / "golden"

OPEN = """
from mla_backends import BackendError
from mla_backends.probe import status
from mla_backends.registry import open_backend
try:
    print("opened", open_backend({name!r}).name)
except BackendError as error:
    print(type(error).__name__)
    print(error)
state = status({name!r})
print("state:", state.state)
print("from:", state.distribution, state.version)
print("reason:", state.reason)
print("hint:", state.hint)
print("evidence:", state.evidence)
"""

CASES = {
    "unknown": ("fake-goud", ["good"]),
    "not_installed": ("metax", ["good"]),
    "no_plugin": ("ascend", ["good"]),
    "duplicate": ("fake-twin", ["duplicate_a", "duplicate_b"]),
    "import_failed": ("fake-broken-import", ["broken_import"]),
    "import_failed_misspelt_hook": ("fake-wrong-hook", ["wrong_hook"]),
    "import_failed_not_a_backend": ("fake-not-a-backend", ["not_a_backend"]),
    "wrong_api_version": ("fake-old-api", ["old_api"]),
    "wrong_api_version_import": ("fake-future-import", ["future_import"]),
    "no_device": ("fake-no-device", ["no_device"]),
    "usable": ("fake-good", ["good"]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_state_prints_its_golden_message(python: Callable[..., str], case: str) -> None:
    name, fakes = CASES[case]
    # Only a usable backend needs torch; all else must come out the same where there is none.
    printed = python(OPEN.format(name=name), *fakes, everything=case == "usable")
    assert printed == (GOLDEN / f"{case}.txt").read_text()


def test_every_state_has_a_golden_message() -> None:
    classes: list[type[errors.BackendError]] = [
        errors.UnknownBackend,
        errors.BackendNotInstalled,
        errors.NoPlugin,
        errors.DuplicateBackend,
        errors.BackendImportError,
        errors.BackendVersionError,
        errors.DeviceUnavailable,
    ]
    states = {USABLE, *(cls.state for cls in classes)}
    golden = {
        line.removeprefix("state: ")
        for path in GOLDEN.glob("*.txt")
        for line in path.read_text().splitlines()
        if line.startswith("state: ")
    }
    assert golden == states
    assert len(states) == 8


def test_plugins_cannot_break_the_one_line_rule() -> None:
    error = errors.DeviceUnavailable("any", "two\nlines.", "with a\n\tstop.")
    assert str(error) == "backend 'any' has no usable device: two lines; with a stop."


def test_a_newer_backend_asks_for_a_newer_contract_package() -> None:
    error = errors.BackendVersionError("any", "dist 3.0", speaks=1, built_for=2)
    assert error.hint.startswith("upgrade mla-backends")


def on(device: str) -> str:
    return f"`--backend torch -O device={device}`"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("CPU", "'cpu'"),
        ("nvidai", "'nvidia'"),
        ("cuda", "'nvidia'"),
        ("Fake-Goud", "'fake-good'"),
        ("Hygon", "'hygon'"),
        ("camricon", "'cambricon'"),
        ("DCU", "'hygon'"),
        ("ppu", "'ali'"),
        ("cup", "'cpu'"),
        ("Huawei", "'ascend'"),
        *((device, on(device.lower())) for device in ("xpu", "NPU", "Mlu", "npu", "mps", "hip")),
        *((word, "") for word in ("acme", "gcu", "gpu", "TPU", "npx", "zzzzzz")),  # nothing is close
    ],
)
def test_did_you_mean_knows_case_slips_platforms_and_devices(typed: str, meant: str) -> None:
    error = errors.UnknownBackend(typed, ["fake-good"], KNOWN)
    guess = f" (did you mean {meant}?)" if meant else ""
    assert str(error).startswith(f"unknown backend '{typed}'{guess}; installed: fake-good; known: cpu, ")
    assert error.hint.startswith(f"did you mean {meant}?" if meant else "installed: fake-good; ")


def test_every_platform_of_infinicore_is_known_with_a_plugin_or_without() -> None:
    """The flags of test/infinicore/framework/config.py at 2cec6ce6, and the torch devices next to it."""
    flags = "cpu nvidia cambricon ascend iluvatar metax moore kunlun hygon qy ali"
    assert set(flags.split()) == {*KNOWN, *WITHOUT_PLUGIN}
    assert not {*KNOWN} & {*WITHOUT_PLUGIN}
    devices = {name: entry.torch_device for name, entry in WITHOUT_PLUGIN.items()}
    named = {"cambricon": "mlu", "ascend": "npu"}
    assert devices == {name: named.get(name, "cuda") for name in WITHOUT_PLUGIN}


@pytest.mark.parametrize("name", WITHOUT_PLUGIN)
def test_a_device_without_a_plugin_gets_commands_that_exist(name: str) -> None:
    known = WITHOUT_PLUGIN[name]
    program, _, words = known.command.partition(" --backend ")
    assert program == "python -m mla.bench"
    name, *options = words.split()
    assert name == "torch"
    assert set(options[::2]) == {"-O"}
    assert {option.partition("=")[0] for option in options[1::2]} <= set(AnyDevice.known_options())
    message = str(errors.NoPlugin(known))
    assert known.command in message
    assert message.count(". ") == 0
    assert ("new-backend" in message) == (known.torch_device != "cuda")
