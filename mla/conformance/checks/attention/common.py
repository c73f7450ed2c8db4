"""What checks of attention share: how they are registered, and the problems they are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mla.conformance.problems.attention import AttentionProblem, Lengths
from mla.conformance.problems.attention_call import writes_lse
from mla.conformance.registry import OP, check
from mla.conformance.trial import Refused, Trial

Check = Callable[[Trial], None]
Register = Callable[[Check], Check]

# A request of each kind: prefill, decode, several tokens with history, one across a page's end.
MIXED = ((5, 1, 9, 2), (5, 70, 64, 129))
# A segment without history, some with one, and a single query.
SEGMENTS = ((5, 1, 20, 3), (5, 70, 20, 67))
# Sizes of tiles, pages and splits of keys, and what queries are cut into.
BORDERS = (16, 32, 64, 128, 256)


def latent_check(name: str, catches: str, fails: str) -> Register:
    """Register a check of `latent_attention` that runs once per op and dtype."""
    return check(f"latent.{name}", catches=catches, scope=OP, kind="latent_attention", fails=fails)


def expanded_check(name: str, catches: str, fails: str) -> Register:
    """Register a check of `expanded_attention` that runs once per op and dtype."""
    return check(f"expanded.{name}", catches=catches, scope=OP, kind="expanded_attention", fails=fails)


def latent(query_lens: Lengths, kv_lens: Lengths, **changes: Any) -> AttentionProblem:
    """Return an absorbed problem."""
    return AttentionProblem(True, query_lens, kv_lens, **changes)


def decode(*kv_lens: int, **changes: Any) -> AttentionProblem:
    """Return an absorbed problem of one new token per request."""
    return latent((1,) * len(kv_lens), kv_lens, **changes)


def expanded(query_lens: Lengths, kv_lens: Lengths, **changes: Any) -> AttentionProblem:
    """Return an expanded problem."""
    return AttentionProblem(False, query_lens, kv_lens, **changes)


def require_lse(trial: Trial) -> None:
    """Refuse to judge a log-sum-exp that the op does not supply."""
    if not writes_lse(trial):
        raise Refused("it does not supply the log-sum-exp (writes_lse is False)")


def around(*borders: int) -> Lengths:
    """Return each number, the one before it and the one after."""
    return tuple(border + beside for border in borders for beside in (-1, 0, 1))
