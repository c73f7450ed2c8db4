"""Checks of our Triton kernels on an emulated device, where each launch is one kernel that is interpreted."""

from __future__ import annotations

import os

import interpreting  # noqa: F401  # before triton
import pytest

import mla
from mla_backends.api import Backend


@pytest.fixture
def backend() -> Backend:
    """Return the backend under test, with graphs allowed."""
    return mla.load_backend(os.environ["EMULATED_BACKEND"], options={"graph": "on"})
