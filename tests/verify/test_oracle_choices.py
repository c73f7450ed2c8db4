"""Several choices of new tokens over one history: the same numbers as apart, and a history expanded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mla.verify import layer_oracle
from mla.verify.layer_oracle import oracle
from mla.weights import random_state_dict

if TYPE_CHECKING:
    from mla import MLAConfig

CHANGES = [{}, {"q_lora_rank": None}, {"attention_bias": True}, {"num_attention_heads": 3}]
LENS, PAST = (3, 1, 2, 0), (5, 0, 9, 4)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def history(config: MLAConfig, lengths: tuple[int, ...]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        (drawn(length, config.kv_lora_rank), drawn(length, config.qk_rope_head_dim)) for length in lengths
    ]


@pytest.mark.parametrize("bytes_at_once", [0, 2 * 8 * 3 * 8, 1 << 28])
@pytest.mark.parametrize("changes", CHANGES)
def test_choices_give_what_each_gives_alone(
    tiny: Callable[..., MLAConfig],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    bytes_at_once: int,
) -> None:
    monkeypatch.setattr(layer_oracle, "LOGITS_BYTES", bytes_at_once)
    monkeypatch.setattr(layer_oracle, "FEW_BYTES", 8 * bytes_at_once)
    config = tiny(**changes)
    state, past = random_state_dict(config, 0, torch.float32), history(config, PAST)
    hidden = drawn(5, sum(LENS), config.hidden_size)
    together = oracle(config, state, hidden, LENS, past)
    apart = torch.stack([oracle(config, state, tensor, LENS, past) for tensor in hidden])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    nothing = drawn(0, config.hidden_size)
    assert oracle(config, state, nothing, [0] * len(PAST), past).shape == nothing.shape


def test_logits_of_all_choices_are_not_made_at_once(
    tiny: Callable[..., MLAConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, at_once = tiny(), list[int]()

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: Any = (), named: Any = None
        ) -> Any:
            if function is torch.ops.aten._softmax.default:
                at_once.append(arguments[0].shape[1] // 2)
            return function(*arguments, **(named or {}))

    monkeypatch.setattr(layer_oracle, "FEW_BYTES", 0)  # each head by itself
    monkeypatch.setattr(layer_oracle, "LOGITS_BYTES", 3 * 8 * 2 * (7 + 2))  # three choices of 2 tokens over 9
    hidden = drawn(8, 2, config.hidden_size)
    with Watched():
        oracle(config, random_state_dict(config, 0, torch.float32), hidden, [2], history(config, (7,)))
    assert at_once == [3, 3, 2] * config.num_attention_heads


def test_a_long_history_is_expanded_once_for_all_choices(tiny: Callable[..., MLAConfig]) -> None:
    """One request's history is most of the work, and 16 choices must not take 16 times as much."""
    config = tiny(num_attention_heads=8, kv_lora_rank=512, qk_nope_head_dim=32, v_head_dim=32)
    state, past = random_state_dict(config, 0, torch.float32), history(config, (2000,))
    counts = []
    for choices in (1, 16):
        with FlopCounterMode(display=False) as counted:
            oracle(config, state, drawn(choices, 2, config.hidden_size), [2], past)
        counts.append(counted.get_total_flops())
    assert counts[1] < 1.2 * counts[0]
