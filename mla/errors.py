"""Errors a user can cause. Each carries the one sentence to print, and the `exit_code` of the command."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return " Did you mean 'x'?" for the closest known word, or nothing."""
    if len(word) > 200:  # no option is as long, and comparing takes time
        return ""
    begun = [name for name in known if word and name.startswith(word)]
    close = begun or difflib.get_close_matches(word, known, n=1)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown(what: str, word: str, known: Sequence[str], takes: str = "Choose from") -> str:
    """Return that there is no such word, which was perhaps meant, and all there are."""
    return f"unknown {what} '{word}'.{did_you_mean(word, known)} {takes}: {', '.join(known)}."


class MLAError(Exception):
    """Base of every error the core raises on purpose."""

    exit_code = 2
    common = False  # every rank of a run meets it, so that rank 0 says it for all


class ConfigError(MLAError):
    """A config that does not describe an MLA layer this core can run."""


class WeightError(MLAError):
    """A state dict that does not fit the config."""


class CacheFormatError(MLAError, ValueError):
    """A format of the latent cache that does not exist, or that cannot hold this config's latents."""


class CacheFull(MLAError):
    """The cache has too few free pages for a request; nothing was changed."""


class StaleBatch(MLAError):
    """A batch was used after the cache it describes had changed."""


class UnsupportedOps(MLAError):
    """Fused ops were required that the backend does not offer, or that cannot serve the layer."""

    exit_code = 3


class UnknownOp(UnsupportedOps):
    """The backend has no op of this name."""

    exit_code = 2


class UnsupportedBatch(MLAError):
    """A fused op refuses the lengths of a batch."""

    exit_code = 3


class OutOfMemory(MLAError):
    """A run needs more memory than is available."""


class ResultError(MLAError):
    """A result file that cannot be written or read."""


class UsageError(MLAError):
    """An option, a workload or a combination of them that cannot be run as asked."""


class RanksError(MLAError):
    """Ranks of a run that do not find each other, do not agree, or are lost."""

    def __init__(self, sentence: str, code: int = 3, common: bool = False) -> None:
        """`common`: every rank meets it, or has been told."""
        super().__init__(f"{sentence.rstrip('.')}.")
        self.exit_code, self.common = code, common
