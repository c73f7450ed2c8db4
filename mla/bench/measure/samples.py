"""What timed passes gave, lane by lane, before anything is summarised."""

from __future__ import annotations

from dataclasses import dataclass, field

from mla.bench.measure.variants import Kind
from mla.verify.verdict import Check


@dataclass
class Series:
    """What one lane gave. Only complete passes are in `passes`."""

    kind: Kind
    check: Check
    clock: str = "none"
    method: str = ""
    passes: list[list[float]] = field(default_factory=list)  # milliseconds
    after_switch: list[bool] = field(default_factory=list)  # per pass: another lane ran before
    checked_again: bool = False  # the outputs of the last pass were


@dataclass
class Measured:
    """What one implementation's passes gave: the headline's, and those of the other lanes."""

    headline: Series
    others: list[Series] = field(default_factory=list)
    interrupted: bool = False
    transient_bytes: int | None = None
    warmups: int = 0
    settled: bool | None = None  # the warm-up ended because latencies had; None: there was none
    device_state: list[dict[str, str]] = field(default_factory=list)

    @property
    def series(self) -> list[Series]:
        """All lanes, the headline first."""
        return [self.headline, *self.others]

    @property
    def passes(self) -> list[list[float]]:
        """The headline's samples."""
        return self.headline.passes

    @property
    def check(self) -> Check:
        """The check of the headline, or that of another lane if it is wrong; the reason names the lane."""
        for one in self.others:
            if one.check.status == "wrong":
                return Check(
                    status="wrong",
                    error_ratio=one.check.error_ratio,
                    relative_error=one.check.relative_error,
                    reason=f"{one.kind}: {one.check.reason}",
                )
        return self.headline.check

    def refuse(self) -> None:
        """Take all numbers from an implementation that was wrong in one lane."""
        for one in self.series:
            one.passes.clear()
            one.after_switch.clear()

    def interrupt(self) -> None:
        """Mark what an interrupt left undone."""
        self.interrupted = True
        for one in self.series:
            if one.check.status == "ok" and not one.checked_again:
                one.check.reason = "interrupted: checked before timing only"
