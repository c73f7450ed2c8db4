"""What a campaign has done so far: one record per step, in campaign.json of its folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

from benchmarks.gpu.steps import Machine, Section
from mla.command.files import write_bytes
from mla.errors import ResultError

FILE = "campaign.json"


class Record(msgspec.Struct, kw_only=True):
    """How a step ended.

    verdict: ok; wrong (a number disagrees with the oracle); doubtful (other evidence contradicts a time,
    which is withheld); refused (one sentence says why it cannot run here); crashed (it broke off); timed
    out; interrupted; skipped (it was not started).
    """

    section: str
    step: str
    verdict: str
    reason: str
    code: int | None = None
    seconds: float = 0.0
    limit: int = 0
    command: str = ""
    final: bool = False  # a later campaign in the same folder keeps it
    failed: bool = False  # it makes the campaign's exit code differ from 0
    kept: bool = False  # from an earlier campaign
    cut: bool = False  # its time was too short for all of it: a later campaign goes on


class Ledger(msgspec.Struct, kw_only=True):
    """The file."""

    schema_version: int = 1
    backend: str
    card: str
    smoke: bool
    facts: dict[str, str]
    ops: dict[str, list[str]]
    records: list[Record] = []

    def find(self, section: str, step: str) -> Record | None:
        """Return the record of a step."""
        return next((one for one in self.records if (one.section, one.step) == (section, step)), None)

    def left(self, sections: Iterable[Section]) -> list[str]:
        """Return the steps of a plan that are about this backend and came to no end, neither good nor bad."""
        open_ended = [one for one in self.records if one.cut or one.verdict in ("skipped", "interrupted")]
        ended = {(one.section, one.step) for one in self.records if one not in open_ended}
        every = [(one.name, step.name) for one in sections if one.serves(self.backend) for step in one.steps]
        return [" ".join(name) for name in every if name not in ended]

    def put(self, record: Record) -> None:
        """Add a record, in place of an older one of the same step."""
        old = self.find(record.section, record.step)
        if old is None:
            self.records.append(record)
        else:
            self.records[self.records.index(old)] = record

    def forget(self, section: str) -> None:
        """Drop all records of a section."""
        self.records = [one for one in self.records if one.section != section]


def opened(folder: Path, machine: Machine, smoke: bool) -> Ledger:
    """Return the folder's ledger, or a new one. Raises `ResultError` if it is another card's."""
    path = folder / FILE
    facts, ops = dict(machine.facts), {op: list(names) for op, names in machine.ops.items()}
    new = Ledger(backend=machine.backend, card=machine.card, smoke=smoke, facts=facts, ops=ops)
    if not path.exists():
        return new
    try:
        old = msgspec.json.decode(path.read_bytes(), type=Ledger)
    except (OSError, msgspec.DecodeError) as error:
        raise ResultError(
            f"cannot go on with '{path}': {error}. Choose another folder with --out."
        ) from error
    for what, before, now in (
        ("backend", old.backend, new.backend),
        ("card", old.card, new.card),
        ("--smoke", old.smoke, new.smoke),
    ):
        if before != now:
            raise ResultError(
                f"'{folder}' holds another campaign: {what} was {before} and is {now}. "
                "Choose another folder with --out."
            )
    new.records = [msgspec.structs.replace(one, kept=True) for one in old.records]
    return new


def save(ledger: Ledger, folder: Path) -> None:
    """Write the ledger whole or not at all. Raises `ResultError`."""
    write_bytes(msgspec.json.format(msgspec.json.encode(ledger), indent=1) + b"\n", folder / FILE)
