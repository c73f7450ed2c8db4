"""The serving example: requests run together, get what they get alone, and hand pages on to others."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from serve_loop import Request, Server

from mla.errors import CacheFull
from mla.integrations.transformers import restore, use_mla


def requests() -> list[Request]:
    draw = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 30, (12, 2), generator=draw).tolist()
    return [
        Request(i, torch.randint(3, 97, (prompt,), generator=draw).tolist(), new)
        for i, (prompt, new) in enumerate(lengths)
    ]


@pytest.mark.parametrize(("pages", "together"), [(10, 2), (300, 4)])
def test_requests_get_what_they_get_alone(pages: int, together: int) -> None:
    """Where there is room for few of them, and for all that are served at once."""
    model: Any = make_model("deepseek_v3")
    words = {"do_sample": False, "eos_token_id": None}
    alone = [
        model.generate(torch.tensor([request.prompt]), max_new_tokens=request.wanted, **words)
        for request in requests()
    ]
    server = Server(use_mla(model), max_tokens=8 * pages, at_once=4, page_size=8)
    use, named = server.cache.use, list[set[int]]()
    server.cache.use = lambda sequences: (named.append({*sequences}), use(sequences))[1]
    served = {answer.number: answer for answer in server.run(requests())}
    assert [served[i].prompt + served[i].tokens for i in range(12)] == [ids[0].tolist() for ids in alone]
    latents = server.cache.latents
    assert latents.free_pages == latents.num_pages
    restore(model)
    assert max(map(len, named)) >= together
    assert sum(bool(now & before and now - before) for before, now in pairwise(named)) > 3, "others go on"


def test_a_request_ends_with_its_token(model: Any) -> None:
    first = next(Server(use_mla(model), max_tokens=256, at_once=1).run([Request(0, [5, 6], 20)]))
    end = first.tokens[4]
    again = next(Server(model, max_tokens=256, at_once=1, ends={1, end}).run([Request(0, [5, 6], 20)]))
    assert again.tokens == first.tokens[: first.tokens.index(end) + 1]


def test_a_request_that_can_never_be_served_is_named(model: Any) -> None:
    server = Server(use_mla(model), max_tokens=64, at_once=2)
    with pytest.raises(CacheFull, match="request 7"):
        list(server.run([Request(6, [5], 3), Request(7, [5], 64)]))
    with pytest.raises(ValueError, match="request 8 has no tokens"):
        list(server.run([Request(8, [], 3)]))
    assert [answer.number for answer in server.run([Request(9, [5], 3)])] == [9]
