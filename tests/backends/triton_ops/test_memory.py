"""Memory for the parts of split requests."""

from __future__ import annotations

import torch

from mla_backends.triton_ops.attention import PartsMemory

LIKE = torch.zeros(1, dtype=torch.int32)


def test_it_grows_by_powers_of_two_and_keeps_what_it_outgrew() -> None:
    """A graph may hold an address of it."""
    memory = PartsMemory()
    first = memory.take(100, LIKE)
    assert (first.dtype, first.shape) == (torch.float32, (128,))
    assert memory.take(128, LIKE) is first
    first.fill_(3.0)
    address = first.data_ptr()
    del first
    larger = memory.take(129, LIKE)
    larger.fill_(0.0)
    assert larger.shape == (256,)
    assert memory.take(1, LIKE) is larger
    kept = next(piece for piece in memory._held[LIKE.device] if piece.data_ptr() == address)
    assert bool((kept == 3.0).all())


def test_it_can_be_written_outside_of_inference_mode() -> None:
    memory = PartsMemory()
    with torch.inference_mode():
        taken = memory.take(4, LIKE)
    taken.add_(1.0)
    assert not taken.is_inference()


def test_nothing_is_still_an_address() -> None:
    assert PartsMemory().take(0, LIKE).shape == (1,)
