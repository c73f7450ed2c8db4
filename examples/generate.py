"""Generate with a model directory in two ways: as `transformers` does it, and with this project's ops.

    python examples/generate.py MODEL_DIR --prompt "Once upon a time"

Prints both texts, the time until the first token, tokens per second after it, and memory: the weights, of
which our ops keep each layer's `kv_b_proj` twice, and beyond them the most that tensors take at once while
generating (cache, results in between, scratch memory).

Each way generates twice: once to warm up and to count memory, which is slow, and once to be timed. With
bfloat16 weights the texts may part where two tokens are as good as equally likely; with --dtype float32 they
rarely do.

Exit codes: 0, both ways ran; 1, they could not (one sentence says why); 2, wrong usage.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import Any, TextIO

import click
import torch
from loading import load, one_sentence
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from mla.bench.measure.samples import TransientBytes
from mla.integrations.transformers import restore, use_mla
from mla.text import size
from mla_backends.api import Packed

DTYPES = ("auto", "bfloat16", "float16", "float32")
PROMPT = "Once upon a time"


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
    tokens: list[int]  # with the prompt's
    times: list[float]  # when the prompt was in, and each new token out
    weights: int  # bytes
    memory: int  # bytes beyond them

    def row(self) -> tuple[str, ...]:
        """Return it as cells of a table."""
        start, first, last = self.times[0], self.times[1], self.times[-1]
        rate = f"{(len(self.times) - 2) / (last - first):.1f}" if last > first else "-"
        return self.name, f"{1e3 * (first - start):.0f} ms", rate, size(self.weights), size(self.memory)


def measure(model: Any, ids: torch.Tensor, name: str, new_tokens: int, console: Console) -> Run:
    """Generate greedily, twice, with a progress bar."""
    with Progress(console=console, transient=True) as progress:

        def generate(doing: str) -> tuple[list[int], list[float]]:
            ticks = Ticks(progress, progress.add_task(f"{name}: {doing}", total=new_tokens))
            words = {"max_new_tokens": new_tokens, "do_sample": False, "streamer": ticks}
            words["return_dict_in_generate"] = False  # which the model's generation_config may ask for
            tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **words)
            return tokens[0].tolist(), ticks.times

        with TransientBytes() as memory:
            generate("warming up, counting memory")
        return Run(name, *generate("timing"), weight_bytes(model), memory.peak)


def weight_bytes(model: Any) -> int:
    """Return the bytes of all weights: those that are as they were loaded, and those packed for our ops."""
    count = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    for module in model.modules():
        count += sum(packed.nbytes for packed in vars(module).values() if isinstance(packed, Packed))
        if attention := getattr(module, "mla_attention", None):
            count += attention.core.weight_bytes()  # kv_b_proj
    return count


def show(tokenizer: Any, runs: list[Run]) -> None:
    """Print runs side by side."""
    out = Console()
    for run in runs:
        out.print(f"[bold]{run.name}[/bold]")
        out.print(escape(tokenizer.decode(run.tokens, skip_special_tokens=True)))
    table = Table("", "first token", "tokens/s", "weights", "memory")
    for run in runs:
        table.add_row(*run.row())
    out.print(table)
    theirs, ours = (run.tokens for run in runs)
    at = next((i for i, pair in enumerate(zip(theirs, ours, strict=False)) if pair[0] != pair[1]), None)
    differ = f"token {at} differs: another order of sums decided a close call"
    out.print("all tokens are the same" if at is None else differ)


def compare(model_dir: str, prompt: str, new_tokens: int, backend: str, dtype: str) -> None:
    """Run both ways and print them; ours first, so that an unsupported model is refused at once."""
    console = Console(stderr=True)
    model, tokenizer = load(model_dir, backend, dtype)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    if not ids.numel():
        raise click.ClickException("the prompt has no tokens: give one with --prompt or --prompt-file.")
    use_mla(model, backend)
    ours = measure(model, ids, f"mla ({backend})", new_tokens, console)
    restore(model)
    show(tokenizer, [measure(model, ids, "transformers", new_tokens, console), ours])


@click.command(help=__doc__)
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False))
@click.option("--prompt", help=f"[default: {PROMPT}]")
@click.option("--prompt-file", type=click.File(encoding="utf-8"), help="Read it from here; - is stdin.")
@click.option("--new-tokens", default=128, show_default=True, type=click.IntRange(2))
@click.option("--backend", default="cpu", show_default=True, help="As `python -m mla.bench list` names them.")
@click.option("--dtype", default="auto", show_default=True, type=click.Choice(DTYPES))
def main(prompt: str | None, prompt_file: TextIO | None, **asked: Any) -> None:
    if prompt is not None and prompt_file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other.")
    try:
        text = prompt_file.read() if prompt_file else PROMPT if prompt is None else prompt
    except UnicodeDecodeError as error:
        raise click.ClickException(f"the prompt file is not UTF-8 text: {error}") from error
    with one_sentence():
        compare(prompt=text, **asked)


if __name__ == "__main__":
    sys.exit(main())
