"""`OpCase`: one call of an op, described; and `Kind`: what is particular to one kind of op."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mla.cases import stress
from mla.cases.memory import PLAIN_LAYOUT, Layout, Tensors, poison
from mla.cases.stress import USUAL, Stress
from mla.config import MLAConfig
from mla.cost import Work
from mla.layer.rope import RotaryTable
from mla.verify.op_oracle import spans_of
from mla.verify.places import Places
from mla.verify.tolerances import judge, judge_lse, relative_error, row_errors
from mla.verify.verdict import Check
from mla_backends.api import FusedOp, SegmentLengths

if TYPE_CHECKING:
    from mla.cases.varied import Call, Pool

Lengths = tuple[int, ...]
Normal = Callable[..., torch.Tensor]  # shape, scale -> N(0, scale^2) in the case's dtype
# What is not in the dtype of the op's spec.
DTYPES: Mapping[str, torch.dtype] = {
    "cos_sin": torch.float32,
    "slots": torch.int64,
    "block_table": torch.int32,
    "kv_lens": torch.int32,
    "cu_q": torch.int32,
    "lse": torch.float32,
    "weights": torch.float32,
    "selection": torch.int32,
}
BYTES = ("bytes", "codes")  # of a row of a cache: see `mla.verify.stored`
OPTIONAL = frozenset({"bias", "lse"})
MOST_WORDS = 12  # of a label, for lengths
KINDS: dict[str, Kind] = {}  # by the name of the op in the contract


@dataclass(frozen=True)
class OpCase:
    """One call of an op. Lengths are per request: new tokens, and keys, new ones included.

    Operands depend on the seed, the name and the shape alone.
    """

    kind: str
    spec: Any  # as passed to the op; its device is that of the call
    query_lens: Lengths
    kv_lens: Lengths
    name: str = ""
    seed: int = 0
    causal: bool = True
    biased: bool = False
    interleaved: bool = True
    eps: float = 1e-6
    rope: MLAConfig | None = None  # the layer whose angles and slots these are; by default they are drawn
    stress: Stress = USUAL
    selection: str = "random"  # how selected tokens lie: a key of `mla.cases.sparse.SELECTIONS`
    values: tuple[str, ...] = ()  # what else is unusual about numbers: keys of `mla.cases.stress.PATTERNS`
    layout: Layout = PLAIN_LAYOUT

    def but(self, **changes: Any) -> OpCase:
        """Return another case. A name is a field of the case, of its spec, of `Stress` or of `Layout`.

        `tokens` new ones of one request may stand for its lengths.
        """
        if "tokens" in changes:
            changes["query_lens"] = changes["kv_lens"] = (changes.pop("tokens"),)
        for part in ("spec", "stress", "layout"):
            value = changes.pop(part, getattr(self, part))
            names = {field.name for field in fields(value)} & changes.keys()
            changes[part] = replace(value, **{name: changes.pop(name) for name in names}) if names else value
        return replace(self, **changes)

    @property
    def label(self) -> str:
        """The size of the case and what is special about it, for reports."""
        sizes = {**vars(self.spec), **self.sizes, "page": self.layout.page_size}
        title = self.entry.title.format(q=runs(self.query_lens), kv=runs(self.kv_lens), **sizes)
        usual = replace(
            self, biased=False, interleaved=True, eps=1e-6, causal=True, seed=0, selection="random"
        )
        special = [stored] if (stored := getattr(self.spec, "cache_format", "")) else []
        special += stress.words(self, usual) + stress.words(self.stress, USUAL)
        return ", ".join([title, *special, *self.values]) + self.layout.label

    @property
    def entry(self) -> Kind:
        """The entry of the case's kind."""
        return entry_of(self.kind, getattr(self.spec, "cache_format", ""))

    @property
    def rows(self) -> int:
        """Number of rows that the op works on."""
        return sum(self.query_lens)

    @property
    def alike(self) -> list[slice]:
        """The rows of each size: they are judged together."""
        sizes = min(stress.SIZES, max(1, self.rows)) if self.stress.spread else 1
        return [slice(first, None, sizes) for first in range(sizes)]

    @property
    def lengths(self) -> SegmentLengths:
        """The lengths as the contract has them."""
        return SegmentLengths(self.query_lens, self.kv_lens, self.causal)

    @property
    def sizes(self) -> dict[str, int]:
        """Letter of a shape -> size."""
        counts = {"T": self.rows, "B": len(self.kv_lens), "K": sum(self.kv_lens)}
        counts["L"] = max([1, *self.kv_lens])
        return counts | {letter: getattr(self.spec, name) for letter, name in self.entry.letters.items()}

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Of every new token: the first key of its request, and how many it sees."""
        return spans_of(self.lengths)

    @property
    def requests_of_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every key: the first key of its request [K], and the number of them [K] int64."""
        lengths = torch.tensor(self.kv_lens)
        return (lengths.cumsum(0) - lengths).repeat_interleave(lengths), lengths.repeat_interleave(lengths)

    @property
    def scalars(self) -> dict[str, Any]:
        """Operands that are no tensors."""
        return {
            name: getattr(self if hasattr(self, name) else self.spec, name) for name in self.entry.scalars
        }

    @property
    def results(self) -> dict[str, Lengths]:
        """The shapes of what a call writes."""
        return {name: self.shape(words) for name, words in self.entry.results.items()}

    @property
    def work(self) -> Work:
        """FLOPs and bytes of one call."""
        return self.entry.work(self)

    def shape(self, words: str) -> Lengths:
        """Return the sizes of a shape, such as "T h c+r"."""
        sizes = self.sizes
        return tuple(dim(word, sizes) for word in words.split())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of an operand or a result."""
        dtype: torch.dtype = self.entry.dtypes.get(name, self.spec.dtype)
        return dtype

    def places(self, table: torch.Tensor | None = None) -> Places:
        """Name the rows of the results; `table` [B, n] is the host's block table."""
        page_size = None if table is None else self.layout.page_size
        return Places.new_tokens(self.query_lens, self.kv_lens, table, page_size)

    def angles(self, rows: int) -> torch.Tensor:
        """Return cosines, then sines [rows, r] fp32: of the new tokens' positions, and of others before.

        Without a layer, they are of angles all around the circle.
        """
        if self.rope is None:
            generator = torch.Generator().manual_seed(self.seed)
            turn = 3 * torch.randn(rows, self.sizes["r"] // 2, generator=generator)
            return torch.cat((turn.cos(), turn.sin()), dim=1)
        longest, table = max(self.kv_lens), RotaryTable(self.rope, torch.device("cpu"))
        table.reserve(longest)
        new = self.places().position
        before = torch.arange(rows - len(new)) * longest // rows
        return table.table[torch.cat((new, before))]


def entry_of(kind: str, cache_format: str = "") -> Kind:
    """Return the entry of a kind of op, over a cache of this format."""
    entry = KINDS[kind]
    return entry.stored if cache_format and entry.stored is not None else entry


def runs(lengths: Lengths) -> str:
    """Return lengths with repeats shortened, 1x6,5, and of many the first few."""
    groups = [(length, len(list(run))) for length, run in groupby(lengths)]
    words = [f"{length}x{count}" if count > 1 else str(length) for length, count in groups]
    if len(words) > MOST_WORDS:
        words = [*words[:3], f"...{len(lengths)} in all, sum {sum(lengths)}"]
    return ",".join(words)


def generator(seed: int, name: str) -> torch.Generator:
    """Return what draws the operands of a case, or the inputs of a scenario."""
    return torch.Generator().manual_seed(seed * 1_000_003 + sum(name.encode()))


def dim(word: str, sizes: Mapping[str, int]) -> int:
    """Return the size of one dimension, such as "c+r" or "B+1", from those of letters."""
    return sum(int(part) if part.isdigit() else sizes[part] for part in word.split("+"))


class Kind:
    """What is particular to one kind of op.

    Shapes are words of letters: T rows, B requests, K keys of all requests, L of the longest, and `letters`.
    `operands` and `results` have the names of `FusedOp`; what an op writes to a cache has names of its own.
    """

    spec: ClassVar[type]
    title: ClassVar[str] = "{q} tokens"  # how large a case is: of its sizes, its spec and its page size
    letters: Mapping[str, str]  # -> field of the spec
    operands: ClassVar[Mapping[str, str]]  # tensors of a call but the cache -> shape; outputs are among them
    results: Mapping[str, str]  # -> shape
    usual: ClassVar[Mapping[str, Any]]  # the spec of most layers, but for its dtype and device
    truths: Mapping[str, str]  # what `truth` returns -> shape; the results, unless an entry says otherwise
    scalars: Mapping[str, type] = {}
    dtypes: Mapping[str, torch.dtype] = DTYPES
    prepares: ClassVar[bool] = False  # a state for a batch's lengths
    in_place: ClassVar[bool] = False  # the output may be the input
    packed: ClassVar[str] = ""  # the shape of a weight that the op packs
    weights: ClassVar[tuple[str, ...]] = ()  # operands that a layer holds
    varied: ClassVar[tuple[str, ...]] = ("x",)  # operands that differ from call to call, by rows
    cached: ClassVar[str] = ""  # the shape of a cached row
    stored: Kind | None = None  # the entry of the same op over a cache of bytes
    pool: type[Pool]  # how they differ
    cost: Callable[..., Work]  # of a spec and its rows

    def __init__(self) -> None:
        self.truths = getattr(self, "truths", self.results)

    def rows(self, case: OpCase) -> int:
        """Return how many rows of operands that are varied a call takes."""
        return case.rows

    def draw(self, case: OpCase, normal: Normal, rows: int) -> Tensors:
        """Return operands at a layer's scales, `rows` of those that are varied; keys and values in order."""
        raise NotImplementedError

    def encoded(self, case: OpCase, given: Tensors) -> Tensors:
        """Return drawn operands as a call has them: in a cache of bytes, encoded."""
        return given

    def truth(self, spec: Any, given: Mapping[str, Any], lengths: SegmentLengths) -> Tensors:
        """Return the results in float64. `given` are operands as `draw` returns them, and the scalars."""
        raise NotImplementedError

    def work(self, case: OpCase) -> Work:
        """Return the FLOPs and bytes of one call."""
        return self.cost(case.spec, case.rows)

    def signs(self, case: OpCase, draw: torch.Generator) -> Tensors:
        """Return signs per column, drawn anew for a call: of operands, and what they make of results."""
        return {}

    def faults(self, results: Tensors, truth: Tensors, **known: Any) -> Iterable[tuple[float, str]]:
        """Yield the error over its bound of every result, and what is wrong with it; "" if nothing is.

        `results` are what a call wrote and `truth` what it had to, rows [T, ..]; for the rest see `fault`.
        """
        for name, result in results.items():
            ratio, reason = self.fault(name, result, truth, **known)
            yield ratio, f"{name}: {reason}" if reason else ""

    def fault(
        self, name: str, result: torch.Tensor, truth: Tensors, *, errors: Tensors, dtype: torch.dtype,
        places: Places | None = None,
    ) -> tuple[float, str]:  # fmt: skip
        """Return the error of one result over its bound, and what is wrong with it.

        `errors` are those of the reference, by row, and `dtype` is the op's.
        """
        if name == "lse":
            return judge_lse(result, truth[name], dtype, places)
        return judge(result, truth[name], errors[name], dtype, places, truth.get("lse"))

    def judge(
        self, results: Tensors, truth: Tensors, errors: Tensors, dtype: torch.dtype,
        places: Places | None = None, damage: str = "",
    ) -> Check:  # fmt: skip
        """Return "ok", or "wrong" with a reason that says where. The same for every kind: see `faults`.

        `damage` is a fault of which the caller knows.
        """
        faults = [(0.0, damage or "it wrote nothing that can be judged")] if damage or not results else []
        faults += self.faults(results, truth, errors=errors, dtype=dtype, places=places)
        reason, worst = "; ".join(said for _, said in faults if said), max(ratio for ratio, _ in faults)
        same = [name for name in results if name in self.held and results[name].shape == truth[name].shape]
        error = relative_error(*((results[name], truth[name]) for name in same))
        return Check(
            status="wrong" if reason else "ok",
            error_ratio=worst if math.isfinite(worst) else None,
            relative_error=error if same and math.isfinite(error) else None,
            reason=reason,
        )

    @property
    def held(self) -> list[str]:
        """The results whose rows are held to the reference's error."""
        return [name for name in self.results if name in self.truths and name not in ("lse", *BYTES)]

    def errors(self, reference: Tensors, truth: Tensors) -> Tensors:
        """Return the relative error of the reference in every row, by which a fused op is judged."""
        return {name: row_errors(reference[name], truth[name]) for name in self.held}

    def place(self, call: Call) -> None:
        """Put operands into memory that have none yet, such as a cache."""

    def batch(self, arguments: Mapping[str, Any], lengths: SegmentLengths) -> Any:
        """Return what the op's state is prepared for; None if it has none."""

    def blank(self, case: OpCase) -> Tensors:
        """Return what the memory that a call writes to holds before, by operand, on the host."""
        shapes = {name: shape for name, shape in case.results.items() if name in self.operands}
        return {name: poison(torch.empty(shape, dtype=case.dtype(name))) for name, shape in shapes.items()}

    def offer(self, call: Call, results: Tensors) -> None:
        """Have the next call write to `results`."""
        call.arguments.update(results)

    def given(self, arguments: Mapping[str, Any], lengths: SegmentLengths) -> Mapping[str, Any]:
        """Return the operands of a call as `truth` takes them."""
        return arguments

    def written(self, arguments: Mapping[str, Any]) -> Tensors:
        """Return what a call wrote, by the names of `results`."""
        return {name: arguments[name] for name in self.results if arguments.get(name) is not None}

    def judged(self, op: FusedOp) -> list[str]:
        """Return the results that an op is held to; it may have no log-sum-exp."""
        return [name for name in self.results if name != "lse" or op.writes_lse]

    def by_token(self, cache: torch.Tensor) -> torch.Tensor:
        """Return a cache [pages, page, w] whose rows are tokens, where those of this one are not: a copy."""
        return cache

    def touched(self, arguments: Mapping[str, Any], page_size: int) -> torch.Tensor:
        """Return the pages [k] int64 of the cache that a call reads or writes, in order, on the host."""
        raise NotImplementedError

    def strays(self, case: OpCase, arguments: Mapping[str, Any]) -> str:
        """Return what was written beside the results, as a clause; "" if nothing was."""
        return ""
