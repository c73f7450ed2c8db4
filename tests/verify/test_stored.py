"""What a cache of some format may hold."""

from __future__ import annotations

import torch

from mla.cache.formats import codec_of
from mla.verify.stored import judge_bytes, stored_truth


def test_a_byte_is_not_certain_because_it_returns_after_as_many_codes() -> None:
    """Numbers next to the true one differ by 8 codes of fp16, and in one byte of float32 not at all."""
    codec = codec_of("fp32", 1, 2)
    assert codec is not None
    latent, key = torch.ones(1, 1), torch.tensor([[0.00016614003106951714, 2.001847763895057]]).double()
    right = stored_truth(latent.double(), key, codec, torch.float16)["bytes"]
    for number, wrong in ((0.00016605854, False), (0.0106, True)):
        key[0, 0] = number
        row = codec.encode(latent, key.half().float())
        assert bool(judge_bytes(row, right, None)[1]) is wrong
