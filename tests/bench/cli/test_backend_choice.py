"""`list`, and a run that names no backend: one usable, several, none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mla.bench import results
from mla_backends.known import KNOWN

Bench = Callable[..., Any]


def test_the_only_usable_backend_is_taken_and_named(isolated: Bench, small: list[str]) -> None:
    done = isolated(*small, "--passes", "1", "-o", "run.json", fakes=["virtual_clock", "no_device"])
    assert done.code == 0
    assert "using backend 'fake-virtual-clock', the only usable one" in done.err
    run = results.decode(Path("run.json").read_bytes())
    assert run.backend.version == "1.0"
    assert all("--backend fake-virtual-clock " in case.repro for case in run.cases)


def test_several_usable_backends_are_no_choice(isolated: Bench) -> None:
    done = isolated("run", fakes=["virtual_clock", "good"])
    assert done.code == 2
    assert done.err == (
        "error: several backends are usable: fake-good, fake-virtual-clock. Choose one with --backend.\n"
    )


def test_no_usable_backend_lists_why(isolated: Bench) -> None:
    done = isolated("run", fakes=["no_device", "broken_import"])
    assert done.code == 3
    known = "; ".join(f"{name} (not installed)" for name in KNOWN)
    assert done.err == (
        "error: no backend is usable: fake-broken-import (import failed); fake-no-device (no device); "
        f"{known}; torch (no device). `mla-bench list` says why.\n"
    )


def test_the_named_backend_alone_decides(isolated: Bench) -> None:
    fakes = ["good", "no_device", "duplicate_a", "duplicate_b", "old_api"]
    done = isolated("--backend", "fake-no-device", fakes=fakes)
    assert (done.code, done.err) == (
        3,
        "error: backend 'fake-no-device' has no usable device: no card on the bus; plug one in.\n",
    )
    done = isolated("--backend", "fake-twin", fakes=fakes)
    assert done.code == 3
    assert done.err.startswith("error: backend 'fake-twin' is offered by 2 distributions, ")


def test_list_shows_every_state_on_one_line_each(isolated: Bench) -> None:
    done = isolated("list", fakes=["virtual_clock", "no_device", "crash", "duplicate_a", "duplicate_b"])
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    columns = [re.split("  +", line, maxsplit=2) for line in lines]
    assert len({line.index(said) for line, (_, _, said) in zip(lines, columns, strict=True)}) == 1
    states = {name: (state, said) for name, state, said in columns}
    assert states["fake-virtual-clock"] == ("usable", "mla-backend-fake-virtual-clock 1.0")
    assert states["fake-no-device"] == (
        "no device",
        "mla-backend-fake-no-device 1.0: no card on the bus; plug one in",
    )
    assert states["fake-crash"][0] == "no answer"
    assert states["fake-crash"][1].startswith("mla-backend-fake-crash 1.0: ")
    assert states["fake-twin"][0] == "duplicate"
    assert states["fake-twin"][1].startswith("offered by 2 distributions")
    assert all(states[name][0] == "not installed" for name in KNOWN)
    assert states["torch"][0] == "no device"
    assert states["torch"][1].startswith("mla-backends ")
    assert "-O device=NAME" in states["torch"][1]


def test_list_json_holds_the_same_for_machines(isolated: Bench) -> None:
    done = isolated("list", "--json", fakes=["good", "no_device"])
    assert (done.code, done.err) == (0, "")
    by_name = {record["name"]: record for record in json.loads(done.out)}
    assert by_name["fake-good"]["state"] == "usable"
    assert by_name["fake-good"]["evidence"] == {"device": "host"}
    assert (by_name["fake-no-device"]["reason"], by_name["fake-no-device"]["hint"]) == (
        "no card on the bus",
        "plug one in",
    )
    assert all(by_name[name]["state"] == "not installed" for name in KNOWN)
