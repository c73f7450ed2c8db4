"""Files, indexes and links the loader refuses, and those it never opens."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import checkpoint_maker as maker
import pytest
from checkpoint_checks import refused

import mla
from mla.checkpoint import CheckpointError, read_layer, refuse_other_formats

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
O_PROJ, SCALE = f"{maker.LAYER}o_proj.weight", f"{maker.LAYER}o_proj.weight_scale_inv"


@pytest.fixture
def made(tmp_path: Path) -> maker.Made:
    """A layer in FP8, in one file."""
    return maker.LAYOUTS["fp8"].make(tmp_path / "model", "ragged")


def header(tensors: object, body: bytes = b"") -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + body


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "model.safetensors' cannot be read, it is truncated or damaged"),
        (b"1234567", "truncated or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "only a Git LFS pointer"),
        (struct.pack("<Q", 2**63 + 5) + b"{}", "truncated or damaged"),
        (struct.pack("<Q", 100) + b"{}", "truncated or damaged"),
        (struct.pack("<Q", 2) + b"xx", "model.safetensors' cannot be read, it is truncated or damaged"),
        (header([]), "truncated or damaged"),
        (header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}), "truncated or damaged"),
        (b"PK\x03\x04" + bytes(40), "truncated or damaged"),
        (b"GGUF" + bytes(40), "truncated or damaged"),
        (bytes(4096), "truncated or damaged"),
    ],
)
def test_broken_files_are_named(content: bytes, reason: str, made: maker.Made) -> None:
    (made.folder / FILE).write_bytes(content)
    refused(made.folder, made.config, reason)


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_truncated_body_is_refused_before_anything_is_read(lost: int, made: maker.Made) -> None:
    content = (made.folder / FILE).read_bytes()
    (made.folder / FILE).write_bytes(content[:-lost])
    with pytest.raises(
        CheckpointError, match=r"model.safetensors' cannot be read, it is truncated or damaged"
    ):
        read_layer(made.folder, made.config)


def test_a_file_that_vanishes_while_it_is_read_is_refused(made: maker.Made) -> None:
    layer = read_layer(made.folder, made.config)
    (made.folder / FILE).unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors' cannot be read"):
        layer["o_proj.weight"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", "'pytorch_model.bin' .* is a pickle, and opening a pickle can run any code"),
        ("model.pt", "is a pickle"),
        ("consolidated.00.pth", "is a pickle"),
        ("layer.gguf", "'layer.gguf' of checkpoint .* is GGUF"),
        ("weights.npz", r"holds no \*.safetensors files"),
    ],
)
def test_other_formats_are_refused_and_never_opened(name: str, reason: str, made: maker.Made) -> None:
    (made.folder / FILE).unlink()
    os.mkfifo(made.folder / name)  # to open it would hang
    refused(made.folder, made.config, reason)
    if "holds no" not in reason:
        with pytest.raises(CheckpointError, match=reason):
            refuse_other_formats(made.folder)


def test_safetensors_beside_a_pickle_are_read(made: maker.Made) -> None:
    os.mkfifo(made.folder / "pytorch_model.bin")
    refuse_other_formats(made.folder)
    assert len(dict(read_layer(made.folder, made.config))) == 7


def test_a_folder_that_is_none_is_refused(made: maker.Made, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", made.folder / FILE):
        refused(path, made.config, f"checkpoint '{path}' is not a directory")
        refuse_other_formats(path)


@pytest.mark.parametrize(
    ("make_special", "reason"), [(os.mkfifo, "it is not a regular file"), (os.mkdir, "Is a directory")]
)
def test_special_files_are_refused(
    make_special: Callable[[Path], None], reason: str, made: maker.Made
) -> None:
    (made.folder / FILE).unlink()
    make_special(made.folder / FILE)
    refused(made.folder, made.config, f"'model.safetensors' of checkpoint .* cannot be opened: {reason}")


# ------------------------------------------------------------------------------------------ the index


@pytest.fixture
def indexed(tmp_path: Path) -> maker.Made:
    """The same in two files, with an index."""
    return maker.LAYOUTS["fp8-sharded"].make(tmp_path / "model", "ragged")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../model/model-00001-of-000002.safetensors", "lies outside the directory"),
        ("/etc/x.safetensors", "file '/etc/x.safetensors' of checkpoint .* lies outside the directory"),
        ("a/../../x.safetensors", "lies outside"),
        ("model-00001-of-000002.bin", "is a pickle"),
        ("model-00001-of-000002.gguf", "is GGUF"),
        ("config.json", r"is not a \*.safetensors file"),
        ("\0.safetensors", "cannot be opened"),
        ("\ud800.safetensors", r"cannot be opened"),
        ("x" * 300 + ".safetensors", "cannot be opened|is missing"),
        ("model-00009-of-000002.safetensors", "00009-of-000002.safetensors' of checkpoint .* is missing"),
        ("model-00001-of-000002.safetensors", "index.json' says that tensor '.*o_proj.weight' is in"),
    ],
)
def test_an_index_that_points_astray_is_refused(file: str, reason: str, indexed: maker.Made) -> None:
    weight_map = json.loads((indexed.folder / INDEX).read_text())["weight_map"]
    (indexed.folder / INDEX).write_text(json.dumps({"weight_map": {**weight_map, O_PROJ: file}}))
    refused(indexed.folder, indexed.config, reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "index.json' is not valid JSON"),
        ("[" * 100000, "is not valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "has no weight_map"),
        ('{"weight_map": {}}', "holds no MLA attention weights"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        ('{"weight_map": ' + "9" * 5000 + "}", "is not valid JSON"),
    ],
)
def test_a_broken_index_is_refused(content: str | bytes, reason: str, indexed: maker.Made) -> None:
    (indexed.folder / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(indexed.folder, indexed.config, reason)


def test_a_huge_index_is_not_parsed(indexed: maker.Made) -> None:
    os.truncate(indexed.folder / INDEX, 1 << 40)
    refused(indexed.folder, indexed.config, "cannot be opened: it is larger than 64 MiB")


def test_several_indexes_are_refused_unless_one_is_the_models(indexed: maker.Made) -> None:
    (indexed.folder / "other.safetensors.index.json").write_text("{}")
    assert len(dict(read_layer(indexed.folder, indexed.config))) == 7
    (indexed.folder / INDEX).rename(indexed.folder / "a.safetensors.index.json")
    refused(
        indexed.folder, indexed.config, "has several indexes: a.safetensors.index.json, other.safetensors"
    )


def test_the_same_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    """As in a tensor-parallel conversion, where each rank's file holds a part under the same name."""
    values = maker.values_of("tiny")
    parts = [maker.deepseek_names(maker.plain(values, seed)) for seed in (0, 1)]
    folder = maker.write(tmp_path / "model", values, *parts)
    refused(
        folder,
        mla.MLAConfig.from_dict(values),
        r"twice: 'layers.3.attn.(w\w+|kv_norm|q_norm).weight' in 'model-00001.* not joined",
    )


# ------------------------------------------------------------------------------------------ links


@pytest.mark.parametrize("name", [FILE, "config.json"])
@pytest.mark.parametrize("relative", [True, False])
def test_links_that_leave_the_directory_are_refused(
    name: str, relative: bool, made: maker.Made, tmp_path: Path
) -> None:
    away = tmp_path / "elsewhere"
    (made.folder / name).rename(away)
    (made.folder / name).symlink_to(os.path.relpath(away, made.folder) if relative else away)
    refused(made.folder, made.config, f"'{name}' of checkpoint .* is a link that leaves the directory")


def test_links_that_leave_a_hub_cache_are_refused(tmp_path: Path) -> None:
    made = maker.LAYOUTS["hub-cache"].make(tmp_path / "model")
    shard = made.folder / "model-00001-of-000002.safetensors"
    (shard.resolve()).rename(tmp_path / "elsewhere")
    shard.unlink()
    shard.symlink_to(tmp_path / "elsewhere")
    refused(made.folder, made.config, "'model-00001-of-000002.safetensors' .* leaves the directory")


@pytest.mark.parametrize("name", [FILE, "config.json", INDEX])
def test_dangling_and_circular_links_are_refused(name: str, made: maker.Made) -> None:
    (made.folder / name).unlink(missing_ok=True)
    (made.folder / name).symlink_to("gone")
    refused(made.folder, made.config, f"'{name}' of checkpoint .* is missing")
    (made.folder / "gone").symlink_to(name)
    refused(made.folder, made.config, f"'{name}' of checkpoint .* (is missing|cannot be opened)")
