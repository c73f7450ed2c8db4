"""`list`: the backends there are, or the presets, or the shipped workloads."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from mla.command.console import out
from mla.command.exit_codes import Exit
from mla.errors import UsageError
from mla_backends import probe
from mla_backends.known import GENERAL, GENERAL_USE


@click.command("list", short_help="Show backends and their state, the presets, or the workloads.")
@click.option("--configs", is_flag=True, help="Show the presets of --config and where they were read.")
@click.option("--workloads", is_flag=True, help="Show the shipped workloads and where they were published.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_backends(configs: bool, workloads: bool, as_json: bool) -> int:
    """Show every installed and known backend and whether it is usable. Each is probed in its own process."""
    if configs and workloads:
        raise UsageError("--configs and --workloads are two lists: ask for one of them.")
    shown = _workloads if workloads else _configs if configs else _backends
    out(shown(as_json))
    return Exit.OK


def _configs(as_json: bool) -> str:
    from mla.bench.terminal import catalog

    return json.dumps(catalog.configs(), indent=1) + "\n" if as_json else catalog.configs_table()


def _workloads(as_json: bool) -> str:
    from mla.bench.terminal import catalog

    return json.dumps(catalog.workloads(), indent=1) + "\n" if as_json else catalog.workloads_table()


def _backends(as_json: bool) -> str:
    backends = probe.statuses(chosen=[*probe.names(), GENERAL])
    if as_json:
        return json.dumps([asdict(one) for one in backends], indent=1) + "\n"
    widths = [max(len(text) for text in column) for column in zip(*map(_named, backends), strict=True)]
    return "".join(_line(one, *widths) for one in backends)


def _named(one: probe.Status) -> tuple[str, str]:
    return one.name, one.state


def _line(one: probe.Status, name: int, state: int) -> str:
    version = f"{one.distribution} {one.version}" if one.distribution else ""
    why = "; ".join(part for part in (one.reason, one.hint) if part)
    if one.name == GENERAL and not why:
        why = f"without a plugin, {GENERAL_USE} (here {one.evidence['device']})"
    said = ": ".join(part for part in (version, why) if part)
    return f"{one.name:{name}}  {one.state:{state}}  {said}".rstrip() + "\n"
