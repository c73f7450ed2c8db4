"""`write_latent`: norm the latent, rotate the shared key, scatter both to the cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mla.conformance.problems.attention import DEEPSEEK, SMALL, Dims, attention_spec
from mla.conformance.problems.tensors import angles, draw, place
from mla.conformance.registry import OP, check
from mla.conformance.trial import Trial, expect
from mla.reference import REFERENCE
from mla.verify.op_oracle import true_norm, true_rotation
from mla.verify.tolerances import same_bits
from mla_backends.api import FusedOp

KIND = "write_latent"


def write_check(
    name: str, catches: str, fails: str = "formula"
) -> Callable[[Callable[[Trial], None]], Callable[[Trial], None]]:
    """Register a check that runs once per op and dtype."""
    return check(f"{KIND}.{name}", catches=catches, scope=OP, kind=KIND, fails=fails)


@dataclass(frozen=True)
class LatentWrite:
    """New tokens of one step and where they go."""

    tokens: int = 9
    page_size: int = 64
    dims: Dims = DEEPSEEK
    interleaved: bool = True
    eps: float = 1e-6
    size: float = 1.0  # of the input
    strided: bool = False

    @property
    def label(self) -> str:
        order = "interleaved" if self.interleaved else "halves"
        return f"{self.tokens} tokens, page {self.page_size}, {order}, size {self.size:g}, eps {self.eps:g}"

    @property
    def pages(self) -> int:
        """Pages of the cache: one in three slots is written."""
        return -(-3 * self.tokens // self.page_size) + 1

    def slots(self) -> torch.Tensor:
        """Return [T] int64, shuffled, with unwritten slots between them."""
        generator = torch.Generator().manual_seed(self.tokens)
        return torch.randperm(self.pages * self.page_size, generator=generator)[: self.tokens]


class HostWrite:
    """The host's side of a write: inputs, and the cache as it is and as the reference leaves it."""

    def __init__(self, problem: LatentWrite, dtype: torch.dtype) -> None:
        dims = problem.dims
        self.problem = problem
        self.kv_a = (draw(problem.tokens, dims.latent) * problem.size).to(dtype)
        self.weight = draw(dims.kv_lora_rank, dtype=dtype, seed=1)
        self.cos_sin = angles(problem.tokens, dims.qk_rope_head_dim)
        self.slots = problem.slots()
        self.before = draw(problem.pages, problem.page_size, dims.latent, dtype=dtype, seed=2)
        self.before[-1] = torch.nan
        self.reference = self.before.clone()
        self.write(REFERENCE[KIND], self.reference, torch.device("cpu"))

    def write(self, op: FusedOp, cache: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        """Run the op on a cache and return its inputs."""
        inputs = {
            "kv_a": place(self.kv_a, device, self.problem.strided),
            "weight": self.weight.to(device, copy=True),
            "cos_sin": self.cos_sin.to(device, copy=True),
            "slots": self.slots.to(device, copy=True),
        }
        op(**inputs, eps=self.problem.eps, interleaved=self.problem.interleaved, cache=cache)
        return inputs

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents [T, c] and keys [T, r] that must be cached, in float64."""
        c = self.problem.dims.kv_lora_rank
        norm = true_norm(self.kv_a[:, :c], self.weight, self.problem.eps)
        return norm, true_rotation(self.kv_a[:, c:], self.cos_sin, self.problem.interleaved)


def check_write(trial: Trial, problem: LatentWrite) -> None:
    """Compare what was cached with the truth."""
    with trial.case(problem.label):
        host, cache, _ = written(trial, problem)
        c = problem.dims.kv_lora_rank
        rows, expected = (
            whole.view(-1, problem.dims.latent)[host.slots] for whole in (cache, host.reference)
        )
        norm, key = host.truth()
        trial.judge(rows[:, :c], norm, expected[:, :c], "latent")
        trial.judge(rows[:, c:], key, expected[:, c:], "rotated key")


def written(trial: Trial, problem: LatentWrite) -> tuple[HostWrite, torch.Tensor, dict[str, torch.Tensor]]:
    """Run the op on the second layer of a cache; return the host's side, that layer, and the op's inputs."""
    dims = problem.dims
    op = trial.require(attention_spec(16, dims, dims.scale, trial.dtype, trial.device))
    host = HostWrite(problem, trial.dtype)
    layers = torch.stack((torch.zeros_like(host.before), host.before)).to(trial.device)
    inputs = host.write(op, layers[1], trial.device)
    expect(not layers[0].any(), "the op wrote to another layer of the cache")
    return host, layers[1].cpu(), inputs


@write_check("formula", "a key that is cached unrotated, or a latent without its norm's weight")
def formula(trial: Trial) -> None:
    """The latent is normed and the key rotated, each as accurately as the dtype allows."""
    for tokens in (1, 9, 130):
        check_write(trial, LatentWrite(tokens))


@write_check("halves", "the `interleaved` argument ignored")
def halves(trial: Trial) -> None:
    """Not interleaved: channels i and i + r/2 of the key are rotated together."""
    check_write(trial, LatentWrite(interleaved=False))


@write_check("eps", "an eps that is fixed, or added after the square root")
def eps(trial: Trial) -> None:
    """With small inputs eps matters, and it is the one that is passed."""
    for value in (1e-6, 1e-5):
        check_write(trial, LatentWrite(size=1e-3, eps=value))


@write_check("large", "squares that overflow a narrow dtype")
def large(trial: Trial) -> None:
    """Inputs in the hundreds are cached as accurately as small ones."""
    check_write(trial, LatentWrite(size=500.0))


@write_check("page_sizes", "a slot that is split into page and offset with a fixed page size")
def page_sizes(trial: Trial) -> None:
    """Slots are rows of the flattened cache, whatever the page size."""
    for size in (1, 16, 128) if trial.quick else (1, 2, 4, 8, 16, 32, 128, 256):
        check_write(trial, LatentWrite(page_size=size))


@write_check("strided", "a kernel that ignores the stride of its input, which is a slice of the projection")
def strided(trial: Trial) -> None:
    """The input may be columns of a wider tensor."""
    check_write(trial, LatentWrite(strided=True))


@write_check("untouched", "a write past the row, to a neighbour's slot or to another layer")
def untouched(trial: Trial) -> None:
    """Slots that are not written keep every bit, NaN included, and so do the other layers."""
    for problem in (LatentWrite(), LatentWrite(tokens=1, page_size=16), LatentWrite(tokens=70)):
        with trial.case(problem.label):
            host, cache, _ = written(trial, problem)
            others = torch.ones(problem.pages * problem.page_size, dtype=torch.bool)
            others[host.slots] = False
            expect_untouched(cache, host.before, others)


def expect_untouched(cache: torch.Tensor, before: torch.Tensor, others: torch.Tensor) -> None:
    """Raise `CheckFailed` if a slot of `others` [slots] has changed; both caches are [pages, page, c + r]."""
    now, then = (whole.flatten(0, 1).contiguous().view(torch.uint8) for whole in (cache, before))
    changed = (now != then).any(1) & others
    if bool(changed.any()):
        page, slot = divmod(int(changed.int().argmax()), cache.shape[1])
        count = int(changed.sum())
        expect(
            False,
            f"{count} slots that should not be written have changed, the first is slot {slot} of page {page}",
        )


@write_check("inputs", "a norm that is taken in place")
def inputs(trial: Trial) -> None:
    """Projection, weight, angles and slots are unchanged after the call."""
    problem = LatentWrite()
    with trial.case(problem.label):
        host, _, given = written(trial, problem)
        changed = [name for name, tensor in given.items() if not same_bits(tensor, getattr(host, name))]
        expect(not changed, f"the op wrote to its input {', '.join(changed)}")


@write_check("other_widths", "a kernel compiled for 512 + 64 that runs on other widths anyway")
def other_widths(trial: Trial) -> None:
    """Widths other than 512 + 64 are served, or refused with a reason."""
    check_write(trial, LatentWrite(dims=SMALL, page_size=16))
