"""The command line of `run` as typed values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mla.bench.workload.implementations import parse
from mla.bench.workload.workload_file import STANDARD
from mla.command.backend import BackendOptions
from mla.errors import UsageError
from mla.parallel.layout import Layout

DEFAULT_DTYPE = "bfloat16"
DEFAULT_PAGE_SIZE = 64


@dataclass(frozen=True)
class RunOptions(BackendOptions):
    """The options of `run`, one field each. None: not given."""

    config: str | None
    model_path: Path | None
    layer: str | None
    preset: str | None
    workload: str | None
    scenarios: tuple[str, ...]
    axes: tuple[str, ...]
    implementations: str | None
    runs: int | None
    passes: int | None
    warmups: int | None
    dtype: str | None
    attention: str
    page_size: int | None
    ops: str
    seed: int
    output: Path | None
    resume: Path | None
    budget: float | None
    hang_after: float
    baseline: Path | None
    fail_slower: float | None
    kind: str
    dry_run: bool
    list_ops: bool
    op: str | None = None
    batch: int | None = None
    kv: int | None = None
    q_len: int | None = None
    heads: int | None = None
    layers: int | None = None
    stages: bool = False
    strict: bool = False
    mode: str | None = None
    cache: str | None = None
    clock: str | None = None
    profile: Path | None = None
    dump_failure: Path | None = None
    batch_specs: tuple[str, ...] = ()
    parallel: Layout | None = None
    simulate: bool = False
    link: str | None = None
    detail: str | None = None  # "verbose" or "quiet"
    link_source: str = ""  # where its numbers are from (`mla.bench.plan.link`)

    @property
    def workload_name(self) -> str:
        """The workload to load: a preset is a shipped one."""
        return self.preset or self.workload or STANDARD

    @property
    def workload_flag(self) -> str | None:
        """The flag that chose the workload; None: the standard one, which nobody asked for."""
        flags = {
            "--preset": self.preset is not None,
            "--workload": self.workload not in (None, STANDARD),
            "--scenario": bool(self.scenarios),
        }
        return next((flag for flag, given in flags.items() if given), None)

    @property
    def target(self) -> Path | None:
        """The file to write: a resumed run goes back where it came from."""
        return self.output or self.resume

    @property
    def op_shape(self) -> dict[str, int | None]:
        """Flag -> value of the options that shape one op."""
        return {
            "--batch": self.batch,
            "--kv": self.kv,
            "--q-len": self.q_len,
            "--heads": self.heads,
        }

    @property
    def implementation_names(self) -> list[str]:
        """The names that were listed; without any, one layer of a checkpoint runs with `transformers`.

        Raises `UsageError`.
        """
        if self.implementations is None:
            alone = self.layers in (None, 1) and self.parallel is None
            return ["mla", "transformers"] if self.model_path and alone else []
        names = list(map(str, parse(self.implementations)))
        if not names:
            raise UsageError("--implementations names nothing: leave it out, or list what to time.")
        return names
