"""Options of a run as typed values, and how they change a workload."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mla.bench.workload import Scenario, WorkloadError, load_workload, select

DEFAULT_CONFIG = "deepseek-v2-lite"


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
    workload: str
    scenarios: tuple[str, ...]
    implementations: str
    runs: int | None
    passes: int | None
    warmups: int | None
    dtype: str
    attention: str
    page_size: int
    ops: str
    seed: int
    output: Path | None
    kind: str
    dry_run: bool
    list_ops: bool
    mode: str | None = None
    cache: str | None = None
    clock: str | None = None

    def chosen_scenarios(self) -> list[Scenario]:
        """Return the workload's scenarios with the counts the user set. Raises `WorkloadError`."""
        counts = {"runs": self.runs, "passes": self.passes, "warmups": self.warmups}
        changes = {name: count for name, count in counts.items() if count is not None}
        scenarios = select(load_workload(self.workload), self.scenarios)
        return [msgspec.structs.replace(scenario, **changes) for scenario in scenarios]

    def check_checkpoint(self, scenarios: Sequence[Scenario]) -> None:
        """Raise `WorkloadError` for options that contradict the checkpoint or need one."""
        if self.layer is not None and not self.model_path:
            raise WorkloadError("--layer chooses a layer of a checkpoint: it needs --model-path.")
        if self.model_path and self.config is not None:
            raise WorkloadError(
                "--config and --model-path exclude each other: the checkpoint's own config.json is used."
            )
        with_heads = [scenario.name for scenario in scenarios if scenario.heads]
        if self.model_path and with_heads:
            raise WorkloadError(f"scenario '{with_heads[0]}' sets heads, which a checkpoint's weights fix.")

    def implementation_names(self) -> list[str]:
        """Return the names the user listed; a checkpoint is compared with `transformers` unless they say."""
        names = [name.strip() for name in self.implementations.split(",") if name.strip()]
        return names or (["mla", "transformers"] if self.model_path else [])

    def key_values(self) -> dict[str, str]:
        """Return the `-O` options. Raises `WorkloadError`."""
        pairs = [option.partition("=") for option in self.backend_options]
        for option, (key, equals, _) in zip(self.backend_options, pairs, strict=True):
            if not key or not equals:
                raise WorkloadError(f"-O wants KEY=VALUE, got '{option}'.")
        return {key: value for key, _, value in pairs}

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
            ("--workload", self.workload, "standard"),
            ("--runs", self.runs, None),
            ("--passes", self.passes, None),
            ("--warmups", self.warmups, None),
            ("--dtype", self.dtype, "bfloat16"),
            ("--attention", self.attention, "auto"),
            ("--page-size", self.page_size, 64),
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
