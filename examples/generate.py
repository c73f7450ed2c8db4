"""Generate with a model directory twice: as `transformers` does it, and with this project's ops.

    python examples/generate.py MODEL_DIR --prompt "Once upon a time" --new-tokens 128 --backend cpu

Prints both texts, tokens per second of decoding, and the most memory that generating took beyond the model.
On the host, what the first run has taken and not given back counts for neither.
"""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from mla import load_backend
from mla.errors import MLAError
from mla_backends import BackendError

try:
    from mla.integrations.transformers import restore, use_mla
except ImportError as error:
    sys.exit(f"error: {error}")
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

DTYPES = ("auto", "bfloat16", "float16", "float32")


class Ticks(BaseStreamer):
    """Notes when each token arrives, and moves a progress bar."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self.times: list[float] = []
        self._progress, self._task = progress, task

    def put(self, value: torch.Tensor) -> None:
        """Note a token; the first call brings the prompt."""
        if self.times:
            self._progress.advance(self._task)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to show."""


@dataclass
class Run:
    """What one way of generating did."""

    name: str
    tokens: list[int]
    prompt_tokens: int
    seconds: float  # of all tokens after the first
    first: float  # seconds until the first token
    memory: int | None  # bytes; None where it is not known

    def row(self) -> tuple[str, ...]:
        """Return it as cells of a table."""
        count = len(self.tokens) - self.prompt_tokens - 1
        rate = f"{count / self.seconds:.1f}" if count > 0 else "-"
        memory = "-" if self.memory is None else f"{self.memory / 2**20:.0f} MiB"
        return self.name, f"{1e3 * self.first:.0f} ms", rate, memory


def generate(model: Any, ids: torch.Tensor, name: str, new_tokens: int, console: Console) -> Run:
    """Generate greedily, with a progress bar."""
    with Progress(console=console, transient=True) as progress:
        ticks = Ticks(progress, progress.add_task(name, total=new_tokens))
        memory = Memory(model.device)
        words = {"max_new_tokens": new_tokens, "do_sample": False, "streamer": ticks}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **words)
    start, first, last = ticks.times[0], ticks.times[1], ticks.times[-1]
    return Run(name, found[0].tolist(), ids.shape[1], last - first, first - start, memory.taken())


class Memory:
    """The most memory that is taken after it was made: of the device, or of this process on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = None if device.type == "cpu" else getattr(torch, device.type)
        if self._device is not None:
            self._device.reset_peak_memory_stats()
            self._before = self._device.memory_allocated()
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
        self._before = self._status("VmRSS")

    def taken(self) -> int | None:
        """Return the bytes; None where the system does not say."""
        if self._device is not None:
            return int(self._device.max_memory_allocated() - self._before)
        peak = self._status("VmHWM")
        return None if peak is None or self._before is None else peak - self._before

    @staticmethod
    def _status(name: str) -> int | None:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return None
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def compare(model_dir: str, prompt: str, new_tokens: int, backend: str, dtype: str) -> bool:
    """Run both ways and print them side by side; return whether all tokens are the same."""
    console = Console(stderr=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    device = load_backend(backend).device  # a backend that is not there is said before the model is read
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype).eval().to(device)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    runs = [generate(model, ids, "transformers", new_tokens, console)]
    use_mla(model, backend)
    runs.append(generate(model, ids, f"mla ({backend})", new_tokens, console))
    restore(model)
    table = Table("", "first token", "tokens/s", "memory taken")
    for run in runs:
        table.add_row(*run.row())
    out = Console()
    for run in runs:
        out.print(
            f"[bold]{run.name}[/bold]", tokenizer.decode(run.tokens, skip_special_tokens=True), sep="\n"
        )
    out.print(table)
    both = zip(*(run.tokens for run in runs), strict=False)
    at = next((place for place, (theirs, ours) in enumerate(both) if theirs != ours), None)
    same = at is None and len(runs[0].tokens) == len(runs[1].tokens)
    differ = f"tokens differ from the {at}th on: another order of sums decided a close call"
    out.print("all tokens are the same" if same else differ)
    return same


@click.command(help=__doc__)
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False))
@click.option("--prompt", default="Once upon a time", show_default=True)
@click.option("--new-tokens", default=128, show_default=True, type=click.IntRange(2))
@click.option("--backend", default="cpu", show_default=True, help="As `python -m mla.bench list` names them.")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(DTYPES))
def main(**asked: Any) -> None:
    try:
        compare(**asked)
    except (MLAError, BackendError, OSError, ValueError) as error:
        raise click.ClickException(str(error).splitlines()[0]) from error


if __name__ == "__main__":
    sys.exit(main())
