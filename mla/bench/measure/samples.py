"""Raw samples of timed passes, variant by variant, before any statistics."""

from __future__ import annotations

from dataclasses import dataclass, field

from mla.bench.measure.variants import Variant
from mla.verify.verdict import Check


@dataclass
class Samples:
    """Samples of one variant of one implementation. Only complete passes are in `passes`."""

    variant: Variant
    check: Check
    clock: str = "none"
    method: str = ""
    passes: list[list[float]] = field(default_factory=list)  # milliseconds
    after_switch: list[bool] = field(default_factory=list)  # per pass: another variant ran before it
    checked_again: bool = False  # the outputs of the last pass were


@dataclass
class Measurement:
    """Everything measured of one implementation: samples of the headline and of the other variants."""

    headline: Samples
    others: list[Samples] = field(default_factory=list)
    interrupted: bool = False
    refused: bool = False  # by an op: the check says why
    transient_bytes: int | None = None
    warmups: int = 0
    settled: bool | None = None  # the warm-up ended because latencies had settled; None: no warm-up
    device_state: list[dict[str, str]] = field(default_factory=list)

    @property
    def samples(self) -> list[Samples]:
        """Samples of all variants, the headline first."""
        return [self.headline, *self.others]

    @property
    def passes(self) -> list[list[float]]:
        """The headline's passes."""
        return self.headline.passes

    @property
    def check(self) -> Check:
        """The headline's check, or that of a wrong variant; the reason then names the variant."""
        for one in self.others:
            if one.check.status == "wrong":
                return Check(
                    status="wrong",
                    error_ratio=one.check.error_ratio,
                    relative_error=one.check.relative_error,
                    reason=f"{one.variant}: {one.check.reason}",
                )
        return self.headline.check

    def discard(self) -> None:
        """Drop all samples of an implementation that was wrong in one variant."""
        for one in self.samples:
            one.passes.clear()
            one.after_switch.clear()

    def interrupt(self) -> None:
        """Mark what an interrupt left undone."""
        self.interrupted = True
        for one in self.samples:
            if one.check.status == "ok" and not one.checked_again:
                one.check.reason = "interrupted: checked before timing only"
