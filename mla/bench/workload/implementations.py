"""The names of `--implementations`, such as `mla` or `mla[latent_attention=mine,linear=reference]`.

In brackets stand ops of the implementation's own: a role of the layer or a kind of op (which means all of its
roles), and what it runs: an op by its name, `reference`, or `*` for each that serves. Needs no torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mla.bench.workload.scenario import repeated
from mla.errors import UsageError

# Implementations that run our layer, and thus take ops in brackets.
OURS = ("mla", "mla-reference")
EVERY = "*"  # in place of an op: each that serves the role, in turns
_FORM = re.compile(r"([^\[\]]*)(?:\[([^\[\]]*)\])?")


@dataclass(frozen=True)
class Named:
    """An implementation and the ops of its own, sorted. `str` is its name in results."""

    base: str
    ops: tuple[tuple[str, str], ...] = ()  # role or kind -> op

    def __str__(self) -> str:
        return f"{self.base}[{','.join('='.join(pair) for pair in self.ops)}]" if self.ops else self.base


def parse(text: str) -> list[Named]:
    """Read a comma-separated list; commas in brackets do not split it. Raises `UsageError`."""
    parts = re.split(r",(?![^\[\]]*\])", text)
    names = [parse_one(part) for part in parts if part.strip()]
    if twice := repeated(names):
        raise UsageError(f"--implementations names '{twice}' twice: it is measured once.")
    return names


def parse_one(text: str) -> Named:
    """Read one name. Raises `UsageError`."""
    form = _FORM.fullmatch(text.strip())
    base = form[1].strip() if form else ""
    if form is None or not base:
        raise UsageError(f"--implementations takes NAME or NAME[ROLE=OP,...], got '{text.strip()}'.")
    if form[2] is None:
        return Named(base)
    if base not in OURS:
        raise UsageError(
            f"'{text.strip()}': {base} cannot be given ops in brackets; only {' and '.join(OURS)} can."
        )
    pairs = []
    for item in form[2].split(","):
        key, _, op = (part.strip() for part in item.partition("="))
        if not key or not op:
            raise UsageError(
                f"'{text.strip()}': brackets hold ROLE=OP, separated by commas, got '{item.strip()}'."
            )
        pairs.append((key, op))
    if twice := repeated(key for key, _ in pairs):
        raise UsageError(f"'{text.strip()}' gives {twice} two ops: keep one.")
    return Named(base, tuple(sorted(pairs)))


def is_ours(name: str) -> bool:
    """Return whether an implementation runs our layer."""
    return parse_one(name).base in OURS
