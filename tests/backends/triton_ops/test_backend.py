"""`TritonBackend`: which tuning a card gets, and who says so."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mla_backends.api import DeviceInfo, NormSpec
from mla_backends.errors import BackendOptionError
from mla_backends.triton_ops import Tile, TritonBackend, Tuning, write_tuning
from mla_backends.triton_ops.tuning import CURE, card_file

TILES = {1: Tile(16, 16, 4, 1)}
SMALL, LARGE = Tuning(TILES, TILES), Tuning({1: Tile(64, 64, 8, 2, programs=2)}, TILES)
CARD = "ACME X100 80GB (SXM)"


class Acme(TritonBackend):
    """The CPU, called a card."""

    name, device_type, api_version = "acme", "cpu", 1
    device = torch.device("cpu")  # as if set up
    reported: Any = None

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(CARD)

    def properties(self) -> Any:
        return self.reported

    def default_tuning(self) -> Tuning:
        return SMALL


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of tunings that were measured; empty so far."""
    monkeypatch.setattr(Acme, "tunings", tmp_path)
    return tmp_path


def test_the_tuning_is_not_known_before_the_device_is() -> None:
    backend = Acme()
    backend.device = None
    assert "tuning" not in backend.vendor_facts()


def test_a_card_that_was_not_measured_gets_the_default(measured: Path) -> None:
    write_tuning(measured / card_file("ACME X100 40GB"), LARGE, {"card": "ACME X100 40GB"})
    backend = Acme()
    assert backend.tuning is SMALL
    assert backend.vendor_facts()["tuning"] == "defaults of the plugin"
    assert [op.tuning is SMALL for op in backend.triton_ops().values() if hasattr(op, "tuning")] == [True] * 3


def test_a_measured_card_is_found_by_its_name(measured: Path) -> None:
    assert card_file(CARD) == "acme-x100-80gb-sxm.json"
    write_tuning(measured / card_file(CARD), LARGE, {"card": CARD, "date": "2026-11-26"})
    backend = Acme()
    assert backend.tuning.latent == LARGE.latent
    assert backend.vendor_facts()["tuning"].startswith(f"{card_file(CARD)}: {CARD}, 2026-11-26 (crc32 ")


def test_a_file_of_the_user_comes_before_all(measured: Path, tmp_path: Path) -> None:
    write_tuning(measured / card_file(CARD), SMALL, {"card": CARD})
    write_tuning(tmp_path / "mine.json", LARGE, {})
    backend = Acme({"tuning": str(tmp_path / "mine.json")})
    assert backend.tuning.latent == LARGE.latent
    assert backend.vendor_facts()["tuning"].startswith("mine.json: of an unknown card (crc32 ")


def test_the_kernels_can_be_switched_off() -> None:
    """So that no compiler runs, and the vendor's attention still does."""
    assert Acme({"triton": "off"}).triton_ops() == {}
    assert Acme({"triton": "on"}).triton_ops()
    with pytest.raises(BackendOptionError, match="takes -O triton=on or off, got 'no'"):
        Acme({"triton": "no"})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read: No such file or directory."),
        ("[]", "cannot be used: it is not a tuning of format 1."),
        ('{"format": 1, "latent": []}', "cannot be used: 'expanded' is missing."),
        (
            '{"format": 1, "latent": [], "expanded": []}',
            "cannot be used: latent needs a tile for 1 row on, and whole numbers of rows.",
        ),
    ],
)
def test_a_file_that_is_no_tuning_is_the_users_mistake(
    tmp_path: Path, text: str | None, sentence: str
) -> None:
    if text is not None:
        (tmp_path / "mine.json").write_text(text)
    with pytest.raises(BackendOptionError) as error:
        Acme({"tuning": str(tmp_path / "mine.json")})
    start = f"backend 'acme' cannot take -O tuning: the tuning file {tmp_path}/mine.json "
    assert str(error.value) == f"{start}{sentence} {CURE}"


@pytest.mark.parametrize(
    ("properties", "size"),
    [
        (None, None),
        (SimpleNamespace(shared_memory_per_block=48 << 10), None),
        (SimpleNamespace(shared_memory_per_multiprocessor=228 << 10), 227 << 10),  # an older torch
        (
            SimpleNamespace(shared_memory_per_block_optin=99 << 10, shared_memory_per_multiprocessor=1),
            99 << 10,
        ),
    ],
)
def test_shared_memory_is_what_the_device_reports(properties: Any, size: int | None) -> None:
    backend = Acme()
    backend.reported = properties
    assert backend.shared_memory() == size


def test_variables_that_change_the_kernels_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/scratch/triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    facts = Acme().vendor_facts()
    assert (facts["TRITON_CACHE_DIR"], facts["TRITON_INTERPRET"]) == ("/scratch/triton", "1")


def test_a_device_that_cannot_run_them_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Acme, "triton_reason", lambda self, device: f"{device} is too old")
    spec = NormSpec(512, torch.bfloat16, torch.device("cpu"))
    assert Acme().triton_ops()["triton_rms_norm"].unsupported_reasons(spec)[0] == "cpu is too old"
