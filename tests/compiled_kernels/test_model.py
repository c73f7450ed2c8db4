"""The model of key steps: its constants, what it counts, and what the committed predictions must reach."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.triton import counting, model
from benchmarks.triton.cards import CARDS, card_of, read
from benchmarks.triton.cases import Case, Target, Work
from benchmarks.triton.fingerprint import fingerprint
from mla_backend_nvidia.kernels import AHEAD_OF_FLASHINFER

# Card -> multiprocessors, GHz, GB/s, FLOP and bytes of shared memory per cycle, instructions per cycle; and
# the dense bfloat16 TFLOP/s of its data sheet. A changed constant changes every prediction.
PUBLISHED = {
    "H100": ((132, 1.83, 3350, {"wgmma": 4096.0, "mma": 2576.384}, 4096, 128, 4), 989.4),
    "H200": ((132, 1.83, 4800, {"wgmma": 4096.0, "mma": 2576.384}, 4096, 128, 4), 989.4),
    "A100": ((108, 1.41, 2039, {"mma": 2048.0}, 2048, 128, 4), 312.0),
    "RTX 4090": ((128, 2.52, 1008, {"mma": 512.0}, 512, 128, 4), 165.2),
    "B200": (
        (148, 1.856, 8000, {"tcgen05": 8192.0, "tcgen05, 64 rows": 4096.0, "mma": 2048.0}, 8192, 128, 4),
        2250.0,
    ),
    "RTX 5090": ((170, 2.407, 1792, {"mma": 512.0}, 512, 128, 4), 209.5),
    "MI300X": ((304, 2.1, 5300, {"mfma": 2048.0}, 2048, 128, 1), 1307.4),
}
# Target -> the least that is reached: products needed over issued; with 128 heads the share of the tensor
# peak, if all units overlap; with 16 that of the bandwidth, if issue overlaps with nothing. It may only rise.
REACHED = {
    "sm_80": (1.0, 0.64, 0.84),
    "sm_89": (1.0, 1.0, 0.95),
    "sm_90": (1.0, 0.68, 0.8),
    "sm_100": (1.0, 0.34, 0.74),
    "sm_120": (1.0, 1.0, 0.93),
    "gfx942": (0.38, 0.26, 0.72),
}


def test_constants_are_those_that_makers_publish() -> None:
    assert {name: tuple(card[1:-1]) for name, card in CARDS.items()} == {
        name: constants for name, (constants, _) in PUBLISHED.items()
    }
    for name, (_, sheet) in PUBLISHED.items():
        assert CARDS[name].tflops() == pytest.approx(sheet, rel=0.005), name
        assert all(source.startswith("https://") for source in CARDS[name].sources), name


@pytest.mark.parametrize(
    ("device", "card"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("nvidia, NVIDIA H200", "H200"),
     ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA H100 PCIe", ""),
     ("NVIDIA GH200 480GB", ""), ("NVIDIA A100-SXM4-40GB", ""),
     ("NVIDIA GeForce RTX 4090 Laptop GPU", ""), ("AMD Instinct MI300X", "")],
)  # fmt: skip
def test_a_device_is_known_by_its_name(device: str, card: str) -> None:
    """Cards with another bandwidth or clock are none of the model's, whatever their names have in common."""
    assert card_of(device) == card


SASS = """
        /*0000*/  HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
.L_x_0:
        /*0010*/  LDSM.16.M88.4 R4, [R2] ;
        /*0020*/  HGMMA.64x32x16.F32.BF16 R8, gdesc[UR8], R8 ;
        /*0030*/  HGMMA.64x256x16.F32.BF16 R8, R4, gdesc[UR8], R8 ;
        /*0040*/  HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0050*/  LDGSTS.E.BYPASS.128 [R3], desc[UR4][R6.64] ;
        /*0060*/  @!P0 STS [R2], R5 ;
        /*0070*/  @P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/  BRA `(.L_x_1) ;
"""
GCN = """
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
.LBB0_1: ; in loop
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\tds_read2_b64 v[0:3], v4 offset1:1
\tds_bpermute_b32 v1, v2, v3
\tv_add_f32 v0, v1, v2
\ts_add_i32 s0, s0, 1
\ts_cbranch_scc0 .LBB0_1
"""
PTX = """
$L__BB0_1:
\tmov.b32 %r1, 67372176;
\t@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r9 + 0 ], %rd1, %rd2, %r1, %p2;
\t@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r9 + 0 ], [ %r8 + 0 ], %rd2, %r1, %p2;
\t@%p3 bra $L__BB0_1;
"""


def test_a_step_is_what_the_loop_holds() -> None:
    wide, narrow = 2 * 64 * 256 * 16, 2 * 64 * 32 * 16
    assert counting.of_nvidia(SASS, "", 8) == {
        "instructions": 7 * 8,
        # Two groups of four warps start each wgmma. Every warp starts its own mma.
        "flops": {"wgmma": 2 * (wide + narrow), "mma": 8 * 2 * 16 * 8 * 16},
        # Operands: rows and columns from shared memory, then columns alone. Four matrices, a copy, a store.
        "shared": 2 * (32 + 64 + 256) * 16 * 2 + 8 * (512 + 512 + 128),
    }
    assert counting.of_amd(GCN, 4) == {
        "instructions": 4,
        "flops": {"mfma": 4 * 2 * 32 * 32 * 8},
        "shared": 4 * 64 * (16 + 4),
    }
    tensor_memory = SASS.replace("HGMMA.64x32x16.F32.BF16 R8,", "UTCHMMA").replace(
        "HGMMA.64x256x16.F32", "FADD"
    )
    counts = counting.of_nvidia(tensor_memory, PTX, 8)
    assert counts
    assert counts["flops"]["tcgen05, 64 rows"] == 2 * 2 * 64 * 16 * 16
    assert counts["shared"] == (64 + 16 + 16) * 16 * 2 + 8 * (512 + 512 + 128)
    assert counting.of_nvidia(SASS.replace("MMA", "ADD"), "", 8) is None


def test_the_slowest_unit_bounds_a_step() -> None:
    arguments: dict[str, dict[str, Any]] = {
        name: {"value": value}
        for name, value in {"ROWS": 64, "KEYS": 32, "HEADS": 128, "LATENT": 512, "ROPE": 64}.items()
    }
    work = Work.of(Case("m:k", arguments, 8, 2, Target("cuda", 80, 32)))
    assert work == (2 * 64 * 32 * 1088, 32 * 576 * 2 / 2), "two programs read the same keys"
    step = {"flops": {"mma": 2 * work.flops}, "shared": 6000 * 128, "instructions": 4 * 1000}
    prediction = model.predict(CARDS["A100"], work, step)
    assert prediction.cycles == {"tensor": 4352, "shared": 6000, "issue": 1000, "memory": 1377}
    assert (prediction.bound, prediction.needed) == ("shared", 0.5)
    assert prediction.tensor_share == (round(2176 / 7000, 3), round(2176 / 6000, 3))
    assert prediction.bandwidth_share == (
        pytest.approx(1377 / 7000, abs=1e-3),
        pytest.approx(1377 / 6000, abs=1e-3),
    )


def test_predictions_are_of_these_kernels_and_tiles() -> None:
    stale = "model.json is of other kernels or tiles: run `python -m benchmarks.triton.model FOLDER`"
    assert read()["kernels"] == fingerprint(), stale
    assert f"`{fingerprint()}`" in model.TABLE.read_text(encoding="utf-8"), stale


def test_what_is_reached_only_rises() -> None:
    """With 16 heads: larger tiles, or fewer warps, take fewer instructions and less shared memory."""
    rows = [row for row in read()["rows"] if row["launch"].startswith("latent")]
    modern = [row for row in rows if not row["triton"].startswith("3.1.")]
    assert {row["triton"].rpartition(".")[0] for row in rows} == {"3.1", "3.6", "3.8", "3.9"}
    assert {row["target"] for row in modern} == set(REACHED)
    for row in modern:
        needed, share, bandwidth = REACHED[row["target"]]
        where = row["triton"], row["card"]
        assert row["spilled"] == 0, where
        assert row["needed"] >= needed, where
        if row["launch"] == "latent: 128 heads":
            assert row["tensor_share"][1] >= share, where
        else:
            assert row["bound"] == "memory", where
            assert row["bandwidth_share"][0] >= bandwidth, where


def test_our_kernel_comes_first_only_where_it_is_predicted_ahead() -> None:
    """By the lower end of the prediction for 128 heads, and by bandwidth with 16."""
    rows = [row for row in read()["rows"] if not row["triton"].startswith("3.1.")]
    ahead = {f"sm_{major}{minor}": beaten for (major, minor), beaten in AHEAD_OF_FLASHINFER.items()}
    there = [row for row in rows if row["target"] in ahead]
    assert {row["target"] for row in there} == {"sm_80", "sm_89", "sm_90", "sm_120"}
    for row in there:
        if row["launch"] == "latent: 128 heads":
            assert row["tensor_share"][0] > ahead[row["target"]], (row["triton"], row["card"])
        if row["launch"] == "latent: 16 heads":
            assert row["bound"] == "memory", (row["triton"], row["card"])
