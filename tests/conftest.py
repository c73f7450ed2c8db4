"""One rule for every test: the packages under test come from one place. And fixtures that folders share."""

from __future__ import annotations

import functools
import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fake_distribution
import pytest
import tiers
from garbage import pytest_collection_finish, pytest_unconfigure
from hypothesis import HealthCheck, settings
from tiers import pytest_collection_modifyitems
from triton_here import lacking

if TYPE_CHECKING:
    import torch

    from mla import MLAConfig

__all__ = ["pytest_collection_finish", "pytest_collection_modifyitems", "pytest_unconfigure"]

# Jobs in the background ignore SIGINT, and those of nohup SIGHUP; children would inherit that.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# Processes that test side by side must not spin for each other's cores; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Tests assert no times, and others may use the machine.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

ROOT = Path(__file__).resolve().parents[1]
REQUIRED = ("mla", "mla_backends")
OPTIONAL = tuple(f"mla_backend_{name}" for name in ("cpu", "nvidia", "moore", "metax", "iluvatar"))
INSTALLED, CHECKOUT = "site-packages", "this checkout"
FAKES = ROOT / "tests" / "fakes"
# Fakes of other versions than 1.0, and that are offered under other names than their own.
VERSIONS = {"broken_import": "1.2.3", "duplicate_b": "2.0", "future_import": "9.0", "old_api": "0.0.1"}
ENTRIES = {
    "hang": ("fake-hang", "fake-hang-too"),
    **dict.fromkeys(("duplicate_a", "duplicate_b"), ("fake-twin",)),
}
pytest.register_assert_rewrite("checkpoint_checks", "engine_bench", "layer_cases")


def pytest_configure(config: pytest.Config) -> None:
    """Choose the tier. Abort when only some packages are installed: the tests would judge a mixture."""
    tiers.choose(config)
    origins = {name: _origin(name) for name in (*REQUIRED, *OPTIONAL)}
    missing = [name for name in REQUIRED if origins[name] is None]
    if missing:
        raise pytest.UsageError(f"cannot import {missing[0]}: install it, or put its folder on PYTHONPATH.")
    sides = {name: _side(origin) for name, origin in origins.items() if origin is not None}
    if set(sides.values()) not in ({INSTALLED}, {CHECKOUT}):
        places = ", ".join(f"{name} from {side}" for name, side in sides.items())
        raise pytest.UsageError(
            f"the packages under test must all come from {INSTALLED} or all from {CHECKOUT}, got {places}."
        )
    # `benchmarks` is no installed package. Last on the path: the checkout must not shadow those that are.
    sys.path.append(str(ROOT))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Say what is left out: by the tier, or for want of a Triton."""
    return [why for why in (tiers.header(config), lacking()) if why]


def _origin(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).resolve() if spec is not None and spec.origin else None


def _side(origin: Path) -> str:
    if {"site-packages", "dist-packages"} & set(origin.parts):
        return INSTALLED
    return CHECKOUT if origin.is_relative_to(ROOT) else str(origin.parents[1])


@pytest.fixture(scope="session")
def install(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that installs a fake, once, and returns the directory."""

    @functools.cache
    def install(fake: str) -> Path:
        target, spelt = tmp_path_factory.mktemp(fake), fake.replace("_", "-")
        entries = dict.fromkeys(ENTRIES.get(fake, (f"fake-{spelt}",)), f"fake_{fake}")
        facts = (f"mla-backend-fake-{spelt}", VERSIONS.get(fake, "1.0"), "mla.backends", entries)
        fake_distribution.install(FAKES / fake, target, *facts)
        return target

    return install


@pytest.fixture(scope="session")
def tiny() -> Callable[..., MLAConfig]:
    """Return a maker of small configs, all dimensions different; keyword arguments replace fields."""
    from mla import MLAConfig

    def make(**changes: Any) -> MLAConfig:
        dims = {
            "hidden_size": 48,
            "num_attention_heads": 3,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
        }
        return MLAConfig(**{**dims, "name": "tiny", **changes})

    return make


@pytest.fixture(scope="session")
def make_history() -> Callable[..., list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return a maker of random cached latents: per length (kv [s, c], pe [s, r]), N(0, 1)."""
    import torch

    def make(
        config: MLAConfig, lengths: list[int], dtype: torch.dtype, seed: int = 1
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)

        def draw(rows: int, width: int) -> torch.Tensor:
            return torch.randn(rows, width, generator=generator, device="cpu").to(dtype)

        return [(draw(s, config.kv_lora_rank), draw(s, config.qk_rope_head_dim)) for s in lengths]

    return make
