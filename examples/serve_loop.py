"""Continuous batching: requests join and leave between two steps, and pages are reused.

    python examples/serve_loop.py MODEL_DIR --prompt "The quick" --prompt "Once upon a time" --at-once 2

The model is one of `transformers`, its attention runs this project's ops, and all requests live in one
`PagedCache`. A request that joins is prefilled alone; then it takes part in every decode step until its end.
Requests are printed as they end. Exit codes: 0, all served; 1, one sentence says why not; 2, wrong usage.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import click
import torch
from loading import end_tokens, load, one_sentence

from mla.errors import CacheFull
from mla.integrations.transformers import PagedCache, use_mla

COUNT = click.IntRange(1)


@dataclass(eq=False)
class Request:
    """A prompt, and what has been generated for it."""

    number: int
    prompt: list[int]
    wanted: int  # new tokens, unless the model ends before
    tokens: list[int] = field(default_factory=list)
    sequence: int = -1  # of the cache, while it is served


class Server:
    """Serves requests with one model, at most `at_once` at a time."""

    def __init__(
        self, model: Any, *, max_tokens: int, at_once: int, ends: Collection[int] = (), page_size: int = 64
    ) -> None:
        """`max_tokens`: of all requests in the cache together. `ends`: tokens that end a request."""
        self.model, self.cache = model, PagedCache(model, max_tokens=max_tokens, page_size=page_size)
        self.at_once, self.ends = at_once, ends
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def run(self, requests: Iterable[Request]) -> Iterator[Request]:
        """Yield requests as they end.

        Raises, before any is served, `CacheFull` for a request that never fits, ValueError for an empty one.
        """
        requests = list(requests)
        for request in requests:
            if not request.prompt:
                raise ValueError(f"request {request.number} has no tokens.")
            if self._pages(request) > self.cache.latents.num_pages:
                raise CacheFull(
                    f"request {request.number} needs more pages than the cache has (--max-tokens)."
                )
        self.waiting.extend(requests)
        while self.waiting or self.running:
            self._admit()
            if going := [request for request in self.running if not self._is_over(request)]:
                self._append(going)
            for request in filter(self._is_over, list(self.running)):
                self.running.remove(request)
                self.cache.latents.release([request.sequence])  # its pages are free for others from now on
                yield request

    def _admit(self) -> None:
        """Prefill those who wait, first come, first served, while there is room for all they may need."""
        latents = self.cache.latents
        while self.waiting and len(self.running) < self.at_once:
            if sum(map(self._pages, [*self.running, self.waiting[0]])) > latents.num_pages:
                return  # until a request ends
            request = self.waiting.popleft()
            (request.sequence,) = latents.new_sequences(1)
            self._append([request])
            self.running.append(request)

    def _pages(self, request: Request) -> int:
        """Return how many pages a request may need in all."""
        return -(-(len(request.prompt) + request.wanted) // self.cache.latents.page_size)

    @torch.no_grad()
    def _append(self, requests: list[Request]) -> None:
        """Run the model on prompts, or on each request's last token, and append the best next one to each."""
        self.cache.use([request.sequence for request in requests])
        new = torch.tensor([request.tokens[-1:] or request.prompt for request in requests])
        cached = [[self.cache.latents.length(request.sequence)] for request in requests]
        lengths = torch.tensor(cached) + new.shape[1]
        columns = int(lengths.max())  # shorter requests are padded on the left; padding takes no pages
        mask = (torch.arange(columns) >= columns - lengths).long()
        positions = lengths - torch.arange(new.shape[1], 0, -1)
        inputs = {"input_ids": new, "attention_mask": mask, "position_ids": positions}
        moved = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        logits = self.model(**moved, **self.cache.argument, use_cache=True).logits[:, -1]
        for request, token in zip(requests, logits.argmax(dim=-1).tolist(), strict=True):
            request.tokens.append(token)

    def _is_over(self, request: Request) -> bool:
        return len(request.tokens) >= request.wanted or request.tokens[-1] in self.ends


@click.command(help=__doc__)
@click.argument("model_dir", type=click.Path(exists=True, file_okay=False))
@click.option("--prompt", "prompts", multiple=True, required=True, help="May be repeated.")
@click.option("--backend", default="cpu", show_default=True)
@click.option("--at-once", default=8, show_default=True, type=COUNT, help="Requests that are served at once.")
@click.option("--max-tokens", default=4096, show_default=True, type=COUNT, help="Room of the cache.")
@click.option("--new-tokens", default=64, show_default=True, type=COUNT, help="Of each request.")
@one_sentence()
def main(model_dir: str, prompts: list[str], new_tokens: int, backend: str, **room: int) -> None:
    model, tokenizer = load(model_dir, backend)
    server = Server(use_mla(model, backend), **room, ends=end_tokens(model, tokenizer))
    requests = [Request(i, tokenizer(text).input_ids, new_tokens) for i, text in enumerate(prompts)]
    for done in server.run(requests):
        click.echo(f"{done.number}: {tokenizer.decode(done.prompt + done.tokens, skip_special_tokens=True)}")


if __name__ == "__main__":
    sys.exit(main())
