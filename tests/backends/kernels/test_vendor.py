"""Vendor packages that are missing, broken or other than expected: reasons to act on, never errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mla_backends import BackendError, FusedOp
from mla_backends.kernels import FlashAttnVarlen, FlashInferMla, FlashMla, IxformerMla
from mla_backends.kernels.vendor import accepts, missing, parameters

OPS: dict[str, Callable[[], FusedOp]] = {
    "flash_mla": lambda: FlashMla(install="pip install it"),
    "ixformer": lambda: IxformerMla(install="pip install it"),
    "flashinfer": lambda: FlashInferMla(install="pip install it"),
    "flash_attn": lambda: FlashAttnVarlen(install="pip install it"),
}
# The file of a package that an adapter imports.
FILES = {
    "flash_mla": "flash_mla/__init__.py",
    "ixformer": "ixformer/inference/functions.py",
    "flashinfer": "flashinfer/mla.py",
    "flash_attn": "flash_attn/__init__.py",
}
each_package = pytest.mark.parametrize("package", OPS)


@pytest.fixture
def package_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: Any
) -> Callable[[str, str], None]:
    """Return a function that makes a package of one module with the given source."""

    def write(package: str, source: str) -> None:
        path = tmp_path / FILES[package]
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in (path.parent, path.parent.parent):
            if folder != tmp_path:
                (folder / "__init__.py").touch()
        path.write_text(source, encoding="utf-8")
        with installed("nvidia_c"):
            pass  # forget what was imported under this name
        monkeypatch.syspath_prepend(tmp_path)

    yield write  # type: ignore[misc]
    with installed("nvidia_c"):
        pass


@each_package
def test_a_missing_package_is_a_reason_with_its_cure(make_spec: Any, package: str) -> None:
    op = OPS[package]()
    assert op.unsupported_reasons(make_spec()) == [f"{package} is not installed (pip install it)"]


@each_package
def test_a_part_that_is_missing_is_named(make_spec: Any, package_file: Any, package: str) -> None:
    package_file(package, "")
    (reason,) = OPS[package]().unsupported_reasons(make_spec())[:1]
    assert " has no " in reason


@each_package
@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("raise ImportError('libacme.so.12: cannot open shared object file')", "libacme.so.12: cannot open"),
        ("raise OSError('undefined symbol: _ZN3c10')", "OSError: undefined symbol: _ZN3c10"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two"),
    ],
)
def test_a_broken_package_is_a_reason_with_the_original_error(
    make_spec: Any, package_file: Any, package: str, source: str, said: str
) -> None:
    package_file(package, source)
    (reason,) = OPS[package]().unsupported_reasons(make_spec())
    assert "is installed but cannot be imported (" in reason
    assert said in reason
    assert "\n" not in reason


RENAMED = {
    "flash_mla": (
        "def get_mla_metadata(*a): ...\ndef flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, "
        "head_dim_v, tile_scheduler_metadata, num_splits, scale, causal): ...",
        "flash_mla.flash_mla_with_kvcache takes no argument softmax_scale",
    ),
    "ixformer": (
        "def vllm_paged_attention_mla(output, query, kv_cache, scale, tables, context_lens, "
        "max_context_len): ...",
        "ixformer.inference.functions.vllm_paged_attention_mla takes no argument block_tables",
    ),
    "flashinfer": (
        "class BatchMLAPagedAttentionWrapper:\n    def plan(self, **anything): ...\n"
        "    def run(self, q_nope, q_pe, ckv_cache, kpe_cache, out, return_lse, "
        "return_lse_base_on_e): ...",
        "flashinfer.mla.BatchMLAPagedAttentionWrapper.run takes no argument lse",
    ),
    "flash_attn": (
        "def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, "
        "causal): ...",
        "flash_attn.flash_attn_varlen_func takes no argument softmax_scale",
    ),
}


@each_package
def test_a_function_of_other_arguments_is_a_reason(make_spec: Any, package_file: Any, package: str) -> None:
    source, reason = RENAMED[package]
    package_file(package, source)
    assert OPS[package]().unsupported_reasons(make_spec()) == [f"{reason} (pip install it)"]


def test_no_log_sum_exp_is_claimed_of_a_package_that_is_missing() -> None:
    assert not IxformerMla().writes_lse


def test_planning_without_the_package_is_one_sentence(make_problem: Any) -> None:
    problem = make_problem([1], [4])
    with pytest.raises(BackendError, match=r"^flash_mla is not installed\.$"):
        FlashMla().prepare(problem.spec, problem.view)


def test_a_function_without_a_signature_is_given_the_benefit_of_the_doubt() -> None:
    def anything(**options: Any) -> None: ...

    assert parameters(dict.update) is None or parameters(anything) is None
    assert parameters(anything) is None
    assert missing(anything, "anything", ["q"]) == []
    assert not accepts(anything, "q")


def test_importing_the_adapters_imports_neither_torch_nor_a_vendor(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from mla_backends.kernels import FlashAttnVarlen, FlashInferMla, FlashMla, IxformerMla\n"
        "ops = FlashMla(), IxformerMla(), FlashInferMla(), FlashAttnVarlen()\n"
        "names = ('torch', 'flash_mla', 'ixformer', 'flashinfer', 'flash_attn')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
