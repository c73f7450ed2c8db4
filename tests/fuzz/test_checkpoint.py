"""Whatever a file holds, the loader reads the layer or raises `CheckpointError`."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path
from typing import Any

import checkpoint_maker as maker
import pytest
from damage import VALUES, attempt
from hypothesis import given, settings
from hypothesis import strategies as st

from mla.checkpoint import CheckpointError, read_layer

FUZZ = settings.get_profile("fuzz")
NUMBERS = st.sampled_from([-1, 0, 1, 16, 63, 64, 2**31, 2**62, 2**63, 2**64]) | st.integers(-5, 5000)
DTYPES = st.sampled_from(
    ["BF16", "F32", "F16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I8", "U16", "C64", "BOOL", "F64", "x"]
)
ENTRIES = st.fixed_dictionaries(
    {"dtype": DTYPES, "shape": st.lists(NUMBERS, max_size=3), "data_offsets": st.lists(NUMBERS, max_size=3)}
)
NAMES = [f"{maker.LAYER}{name}" for name in maker.plain(maker.values_of("tiny"))] + ["__metadata__", "other"]


def attempt_to_read(made: maker.Made) -> None:
    """Read the layer; nothing but its own error may come out. What is read has the right shape."""

    def weights() -> None:
        for name, weight in read_layer(made.folder, made.config, made.layer).items():
            assert weight.shape == made.state[name].shape
            assert weight.isfinite().all()

    attempt(weights)


@pytest.fixture
def made() -> maker.Made:
    return maker.LAYOUTS["fp8"].make(Path("model"), "tiny")


@FUZZ
@given(data=st.data())
def test_damaged_bytes(made: maker.Made, data: st.DataObject) -> None:
    file = made.folder / "model.safetensors"
    good = _original(made, file)
    end = 8 + int.from_bytes(good[:8], "little")
    spots = st.tuples(st.integers(0, end + 100), st.integers(0, 255))
    damaged = bytearray(good)
    for place, byte in data.draw(st.lists(spots, min_size=1, max_size=4)):
        damaged[place] = byte
    file.write_bytes(damaged[: data.draw(st.none() | st.integers(0, len(good)))])
    attempt_to_read(made)


@FUZZ
@given(
    text=st.dictionaries(st.sampled_from(NAMES), ENTRIES | VALUES, max_size=4) | VALUES,
    length=st.none() | NUMBERS,
)
def test_invented_headers(made: maker.Made, text: Any, length: int | None) -> None:
    header = json.dumps(text).encode()
    size = len(header) if length is None else length
    content = struct.pack("<Q", size % 2**64) + header + bytes(64)
    (made.folder / "model.safetensors").write_bytes(content)
    attempt_to_read(made)


@FUZZ
@given(changes=st.dictionaries(st.sampled_from(NAMES), ENTRIES | VALUES, min_size=1, max_size=2))
def test_headers_with_some_entries_replaced(made: maker.Made, changes: dict[str, Any]) -> None:
    file = made.folder / "model.safetensors"
    good = _original(made, file)
    end = 8 + int.from_bytes(good[:8], "little")
    entries = json.loads(good[8:end])
    for name, entry in changes.items():
        merged = {**entries[name], **entry} if name in entries and isinstance(entry, dict) else entry
        entries[name] = merged
    header = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + good[end:])
    attempt_to_read(made)


def _original(made: maker.Made, file: Path) -> bytes:
    """Return the file as it was made; examples of one test share a folder."""
    kept = made.folder.parent / "original"
    if not kept.exists():
        kept.write_bytes(file.read_bytes())
    return kept.read_bytes()


SHARDS = (
    "model-00001-of-000002.safetensors",
    "../x.safetensors",
    "/x.safetensors",
    "config.json",
    "gone.safetensors",
)


@FUZZ
@given(content=VALUES | st.dictionaries(st.sampled_from(NAMES), st.sampled_from(SHARDS) | st.text() | VALUES))
def test_invented_indexes(content: Any) -> None:
    folder = Path("model")
    made = maker.Made(folder, maker.plain(maker.values_of("tiny")), maker.values_of("tiny"))
    if not folder.exists():
        made = maker.LAYOUTS["sharded"].make(folder)
    index = folder / "model.safetensors.index.json"
    for text in (content, {"weight_map": content}):
        index.write_text(json.dumps(text))
        attempt_to_read(made)


@FUZZ
@given(content=st.binary(max_size=200) | st.text(max_size=50).map(str.encode))
def test_indexes_of_any_bytes(made: maker.Made, content: bytes) -> None:
    (made.folder / "model.safetensors.index.json").write_bytes(content)
    attempt_to_read(made)


KEYS = st.sampled_from(
    ["num_hidden_layers", "num_nextn_predict_layers", "quantization_config", "text_config"]
)
QUANTIZATION = st.dictionaries(
    st.sampled_from(["quant_method", "fmt", "weight_block_size"]), VALUES | st.lists(NUMBERS)
)


@FUZZ
@given(content=VALUES | st.dictionaries(KEYS, VALUES | NUMBERS | QUANTIZATION))
def test_configs(made: maker.Made, content: Any) -> None:
    values = {**made.values, **content} if isinstance(content, dict) else content
    (made.folder / "config.json").write_text(json.dumps(values))
    attempt_to_read(made)


@FUZZ
@given(layer=st.none() | st.integers() | st.text(max_size=5) | st.from_regex(r"[0-9]{1,9}\.[0-9]{1,9}"))
def test_layers(made: maker.Made, layer: Any) -> None:
    made.layer = layer
    attempt_to_read(made)


@pytest.mark.parametrize("length", [2**63, 2**40, 2**31, 99_999_999])
def test_an_absurd_header_length_allocates_nothing(made: maker.Made, length: int) -> None:
    attempt_to_read(made)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = made.folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_layer(made.folder, made.config)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10
