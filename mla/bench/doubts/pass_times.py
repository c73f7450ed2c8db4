"""What the clocks said of one pass."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PassTimes:
    """Milliseconds of one pass. CPU time is that of all threads of the process."""

    samples: list[float] = field(default_factory=list)  # of the variant's clock, of timed forwards
    inside: list[float] = field(default_factory=list)  # the runner's clock around the same regions
    forwards: int = 0  # timed or not
    regions: float = 0.0  # the runner's clock around all forwards
    regions_cpu: float = 0.0
    wall: float = 0.0  # from the restored history until all outputs are on the host, without cache flushes
    wall_cpu: float = 0.0
    disturbed: bool = False  # others had the CPUs for long (`mla.bench.doubts.clock.Disturbance`)

    @property
    def beside(self) -> float:
        """Return the time of the pass that belongs to no forward."""
        return self.wall - self.regions

    @property
    def beside_cpu(self) -> float:
        """Return the CPU time of the pass that belongs to no forward."""
        return self.wall_cpu - self.regions_cpu
