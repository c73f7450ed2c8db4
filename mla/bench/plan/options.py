"""Options of a run as typed values, and how they change a workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mla.bench import results
from mla.bench.workload import grid as axes
from mla.bench.workload.grid import Axes, Point
from mla.bench.workload.op_scenario import op_scenario
from mla.bench.workload.scenario import STANDARD, Scenario, load_workload, select
from mla.command.options import key_values
from mla.config.presets import DEFAULT_CONFIG
from mla.errors import UsageError

DEFAULT_DTYPE = "bfloat16"
DEFAULT_PAGE_SIZE = 64


@dataclass(frozen=True)
class RunOptions:
    """The command line of `run`, one field per option."""

    backend: str | None
    device: int | None
    backend_options: tuple[str, ...]
    threads: int | None
    config: str | None
    model_path: Path | None
    layer: str | None
    preset: str | None
    workload: str | None
    scenarios: tuple[str, ...]
    axes: tuple[str, ...]
    implementations: str
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
    mode: str | None = None
    cache: str | None = None
    clock: str | None = None

    @property
    def workload_name(self) -> str:
        """The workload to load: a preset is a shipped one."""
        return self.preset or self.workload or STANDARD

    def chosen_scenarios(self) -> list[Point]:
        """Return the workload's scenarios with the user's counts and grids. Raises `UsageError`."""
        if self.preset and self.workload:
            raise UsageError("--preset and --workload exclude each other: a preset is a shipped workload.")
        grid = axes.parse(self.axes)
        self._check_op(grid)
        points = axes.lay(self._counted(), grid)
        for flag, name in (("--dtype", "dtype"), ("--page-size", "page_size")):
            if getattr(self, name) is not None and any(name in point.point for point in points):
                raise UsageError(
                    f"{flag} and an axis {name} exclude each other: name every value in the axis."
                )
        return points

    def _counted(self) -> list[Scenario]:
        """Return the workload's scenarios, or the op, with the counts the user set."""
        counts = {"runs": self.runs, "passes": self.passes, "warmups": self.warmups, "layers": self.layers}
        changes = {name: count for name, count in counts.items() if count is not None}
        if self.op is not None:
            scenarios: list[Scenario] = [op_scenario(self.op, self.batch, self.kv, self.q_len, self.heads)]
        else:
            scenarios = select(load_workload(self.workload_name), self.scenarios)
        return [msgspec.structs.replace(scenario, **changes) for scenario in scenarios]

    def run_dtype(self, points: Sequence[Point]) -> str:
        """Return the dtype of the run; with an axis of dtypes, that of its first point."""
        return self.dtype or points[0].dtype or DEFAULT_DTYPE

    def run_page_size(self, points: Sequence[Point]) -> int:
        """Return the page size of the run; with an axis of page sizes, that of its first point."""
        return points[0].page_size or DEFAULT_PAGE_SIZE if self.page_size is None else self.page_size

    @property
    def target(self) -> Path | None:
        """The file to write: a resumed run goes back where it came from."""
        return self.output or self.resume

    def read_baseline(self) -> results.Run | None:
        """Return the run to compare with. Raises `UsageError`, `ResultError`."""
        if self.baseline is None and self.fail_slower is not None:
            raise UsageError("--fail-slower needs a run to compare with: add --baseline FILE.")
        return results.read(self.baseline) if self.baseline else None

    def selection(self) -> list[str]:
        """Return the options that choose scenarios and points."""
        words = [word for name in self.scenarios for word in ("--scenario", name)]
        shape = (("--op", self.op), ("--batch", self.batch), ("--kv", self.kv), ("--q-len", self.q_len))
        for flag, value in (*shape, ("--heads", self.heads)):
            words += [] if value is None else [flag, str(value)]
        return words + [word for axis in self.axes for word in ("-a", axis)]

    def _check_op(self, grid: Axes) -> None:
        """Raise `UsageError` for options that mean nothing with `--op`, without it, or with an axis."""
        shape = {"--batch": self.batch, "--kv": self.kv, "--q-len": self.q_len, "--heads": self.heads}
        given = [flag for flag, value in shape.items() if value is not None]
        for flag in given:
            if flag[2:].replace("-", "_") in grid:
                raise UsageError(f"{flag} and an axis of that name exclude each other: keep one.")
        if self.op is None and given:
            raise UsageError(f"{given[0]} shapes one op: it needs --op; a workload has its own lengths.")
        layer = {
            "--workload": self.workload not in (None, STANDARD),
            "--preset": self.preset is not None,
            "--scenario": self.scenarios,
            "--model-path": self.model_path,
            "--attention": self.attention != "auto",
            "--layers": self.layers is not None,
        }
        given = [flag for flag, value in layer.items() if value]
        if self.op is not None and given:
            raise UsageError(
                f"{given[0]} is about the whole layer: leave it out with --op, whose shape is --batch, --kv, "
                "--q-len, --heads and --config."
            )

    def check_stages(self, scenarios: Sequence[Scenario], implementations: Sequence[str]) -> None:
        """Raise `UsageError` where there are no parts to time, or not those of one layer."""
        if not self.stages:
            return
        if not any(name.startswith("mla") for name in implementations):
            raise UsageError("--stages times the parts of mla and mla-reference: run one of them.")
        if self.op is not None:
            raise UsageError("--stages times the parts of a layer, and --op is one part alone.")
        if any(scenario.layers > 1 for scenario in scenarios):
            raise UsageError("--stages times one layer: leave out --layers.")

    def check_checkpoint(self, scenarios: Sequence[Scenario]) -> None:
        """Raise `UsageError` for options that contradict the checkpoint or need one."""
        if self.layer is not None and not self.model_path:
            raise UsageError("--layer chooses a layer of a checkpoint: it needs --model-path.")
        if self.model_path and self.config is not None:
            raise UsageError(
                "--config and --model-path exclude each other: the checkpoint's own config.json is used."
            )
        with_heads = [scenario.name for scenario in scenarios if scenario.heads]
        if self.model_path and with_heads:
            raise UsageError(f"scenario '{with_heads[0]}' sets heads, which a checkpoint's weights fix.")

    def implementation_names(self) -> list[str]:
        """Return the names the user listed; a checkpoint is compared with `transformers` unless they say."""
        names = [name.strip() for name in self.implementations.split(",") if name.strip()]
        return names or (["mla", "transformers"] if self.model_path and self.layers in (None, 1) else [])

    def key_values(self) -> dict[str, str]:
        """Return the `-O` options. Raises `UsageError`."""
        return key_values(self.backend_options)

    def _config(self) -> str:
        return DEFAULT_CONFIG if self.config is None else self.config

    def command(self, backend: str) -> list[str]:
        """Return the options that reproduce any case of this run."""
        flags: Sequence[tuple[str, object, object]] = (
            ("--device", self.device, None),
            ("--threads", self.threads, None),
            ("--config", None if self.model_path else self._config(), None),
            ("--model-path", self.model_path, None),
            ("--layer", self.layer, None),
            ("--workload", self.workload_name, STANDARD),
            ("--runs", self.runs, None),
            ("--passes", self.passes, None),
            ("--warmups", self.warmups, None),
            ("--layers", self.layers, None),
            ("--dtype", self.dtype, DEFAULT_DTYPE),
            ("--attention", self.attention, "auto"),
            ("--page-size", self.page_size, DEFAULT_PAGE_SIZE),
            ("--ops", self.ops, "auto"),
            ("--seed", self.seed, None),
            ("--mode", self.mode, None),
            ("--cache", self.cache, None),
            ("--clock", self.clock, None),
        )
        words = ["--backend", backend]
        for option in self.backend_options:
            words += ["-O", option]
        for flag, value, default in flags:
            if value is not None and value != default:
                words += [flag, str(value)]
        return words
