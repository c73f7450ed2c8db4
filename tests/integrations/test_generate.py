"""The example that shows both ways side by side, on a tiny checkpoint with a tokenizer trained here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import VOCABULARY, make_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "generate.py"
TEXT = ["once upon a time there was a latent cache that everybody attended to", "and it was small"] * 9


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as `save_pretrained` leaves it: config, safetensors, tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    make_model("deepseek_v2").save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special))
    words = {"pad_token": "[PAD]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words).save_pretrained(folder)
    return folder


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLE), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_both_runs_are_side_by_side(model_dir: Path) -> None:
    done = run(str(model_dir), "--prompt", "once upon a time", "--new-tokens", "20", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    for name in ("transformers", r"mla \(cpu\)"):
        assert re.search(rf"{name} +│ +\d+ ms +│ +\d+\.\d +│ +-?\d+ MiB", done.stdout), done.stdout
    assert "all tokens are the same" in done.stdout


def test_a_directory_that_holds_no_model_is_one_sentence(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["generate.py", "serve_loop.py"])
def test_what_is_missing_is_one_sentence(name: str) -> None:
    """An environment made from README's first command has no `transformers`."""
    path = str(EXAMPLE.with_name(name))
    program = (
        f"import runpy, sys; sys.modules['transformers'] = None; runpy.run_path({path!r}, None, '__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this needs transformers 5.20 or later: `pip install")
    assert len(done.stderr.strip().splitlines()) == 1
