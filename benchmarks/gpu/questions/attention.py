"""Questions about torch's own attention on the expanded path: which kernel it picks, and at what cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.gpu.questions.asking import Asked, microseconds, question, raised, worst

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from mla_backends.api import Backend

HEADS, KEY, VALUE, SCALE = 16, 192, 128, 0.1147
QUERIES, HISTORY = 256, 256


def _inputs(backend: Backend, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return q [t, h, 192], k [s, h, 192] and v [s, h, 128]."""
    import torch

    generator = torch.Generator().manual_seed(queries)
    shapes = ((queries, HEADS, KEY), (keys, HEADS, KEY), (keys, HEADS, VALUE))
    q, k, v = (torch.randn(shape, generator=generator).to(backend.device, torch.bfloat16) for shape in shapes)
    return q, k, v


def kernels_of(backend: Backend, call: Callable[[], object]) -> str:
    """Return the kernels that a call launches, by the profiler; its ops where it sees no kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds.append(ProfilerActivity.CUDA)
    call()
    with profile(activities=kinds) as seen:
        call()
        backend.synchronize()
    events = seen.events() or []
    there = [event.name for event in events if "CPU" not in str(event.device_type)]
    ops = [event.name for event in events if "attention" in event.name]
    return ", ".join(dict.fromkeys(name.partition("(")[0][:60] for name in there or ops)) or "none seen"


@question("sdpa", "Which kernel does torch's attention run for keys of 192 and values of 128, padded or not?")
def sdpa(backend: Backend) -> Asked:
    import torch
    from torch.nn.functional import pad, scaled_dot_product_attention

    answers: dict[str, object] = {}
    times: dict[str, float] = {}
    for keys, hidden in ((QUERIES, "causal"), (QUERIES + HISTORY, "mask"), (QUERIES, "all keys")):
        q, k, v = (operand.transpose(0, 1)[None] for operand in _inputs(backend, QUERIES, keys))
        mask = torch.ones(QUERIES, keys, dtype=torch.bool, device=q.device).tril_(keys - QUERIES)
        for how, values in (("unpadded", v), ("padded", pad(v, (0, KEY - VALUE)))):

            def call(q=q, k=k, v=values, mask=mask, hidden=hidden):  # type: ignore[no-untyped-def]
                seen = mask if hidden == "mask" else None
                return scaled_dot_product_attention(
                    q, k, v, attn_mask=seen, is_causal=hidden == "causal", scale=SCALE
                )

            name = f"{hidden}, {how}"
            if refusal := raised(call):
                answers[name] = refusal
                continue
            times[name] = microseconds(backend, call, calls=10)
            answers[name] = f"{times[name]} us: {kernels_of(backend, call)}"
    said = ", ".join(f"{name} {us} us" for name, us in times.items())
    return Asked(said, answers)


@question("varlen", "Does torch's own ragged flash attention serve the expanded path, with its log-sum-exp?")
def varlen(backend: Backend) -> Asked:
    import torch

    from mla.verify.op_oracle import attend

    lengths = ((64, 64), (3, 67), (1, 40))  # new tokens and keys of each segment
    parts = [_inputs(backend, *length) for length in lengths]
    q, k, v = (torch.cat(operand) for operand in zip(*parts, strict=True))
    wide = torch.nn.functional.pad(v, (0, KEY - VALUE))
    bounds = [
        torch.tensor([0, *of_requests]).cumsum(0).int().to(q.device)
        for of_requests in zip(*lengths, strict=True)
    ]
    longest = [max(of_requests) for of_requests in zip(*lengths, strict=True)]

    def call() -> tuple[torch.Tensor, ...]:
        return torch.ops.aten._flash_attention_forward(
            q, k, wide, *bounds, *longest, 0.0, True, False, scale=SCALE
        )

    if refusal := raised(call):
        return Asked(f"no: {refusal}")
    out, lse = call()[:2]
    truth = [attend(a.cpu(), b.cpu(), c.cpu(), SCALE, causal=True) for a, b, c in parts]
    out_error = worst(out[..., :VALUE], torch.cat([part[0] for part in truth]))
    lse_error = _lse_error(lse, torch.cat([part[1] for part in truth]))
    right = out_error < 2e-2 and lse_error < 1e-2
    said = "yes, out and lse are right" if right else "no, its numbers are not those of the oracle"
    more = {"lse shape": list(lse.shape), "kernels": kernels_of(backend, call)}
    us = microseconds(backend, call, calls=10)
    return Asked(said, {"out error": out_error, "lse error": lse_error, "us": us, **more})


def _lse_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest difference; torch gives [h, T], the oracle [T, h]."""
    if got.shape != (exact.shape[1], exact.shape[0]):
        return float("inf")
    return float((got.T.cpu().double() - exact).abs().max())
