"""The examples, both ways side by side and a server, on a tiny checkpoint with a tokenizer trained here."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner
from test_refusals import without_mla
from tiny_models import VOCABULARY, make_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM, DeepseekV2MLP

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
import stock_padding
from serve_loop import Request, Server

from mla.errors import CacheFull
from mla.integrations.transformers import restore, use_mla

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
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


def run(*words: str, name: str = "generate.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def refused(main: Any, *words: str, code: int) -> str:
    """Return the one sentence that a command ends with."""
    done = CliRunner().invoke(main, words)
    assert done.exit_code == code, done.stderr
    assert isinstance(done.exception, SystemExit), done.exception
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    return error


def test_both_runs_are_side_by_side(model_dir: Path, tmp_path: Path) -> None:
    """The prompt is long, so that what `transformers` expands is most of the memory."""
    (tmp_path / "prompt.txt").write_text("once upon a time " * 40)
    prompt = ("--prompt-file", str(tmp_path / "prompt.txt"))
    done = run(str(model_dir), *prompt, "--new-tokens", "20", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    sizes = []
    for name in ("transformers", r"mla \(cpu\)"):
        match = re.search(rf"{name} +│ +\d+ ms +│ +\d+\.\d +│ +(\d+) KiB +│ +([\d.]+) MiB", done.stdout)
        assert match, done.stdout
        sizes.append((int(match[1]), float(match[2])))
    (their_weights, their_memory), (our_weights, our_memory) = sizes
    assert our_memory < their_memory
    assert our_weights > their_weights
    assert "all tokens are the same" in done.stdout


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3 with biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_are_counted(family: str, dtype: torch.dtype) -> None:
    """Those of two layers: kv_b_proj twice, and whatever fills up the last 15 outputs of a projection."""
    weight_bytes = importlib.import_module("generate").weight_bytes
    model = make_model(family, dtype)
    theirs = weight_bytes(model)
    held = sum(weight.nbytes for weight in model.state_dict().values())
    assert held <= theirs < held + 1024, "and frequencies of rotations"
    projections = [(name, weight) for name, weight in model.named_parameters() if "_proj.weight" in name]
    more = sum(weight.nbytes for name, weight in projections if "kv_b_proj" in name)
    filled = sum(15 * weight.nbytes // weight.shape[0] for name, weight in projections if "self_attn" in name)
    ours = weight_bytes(use_mla(model))
    assert theirs + more <= ours < theirs + more + filled
    assert weight_bytes(restore(model)) == theirs


def test_what_the_model_generates_with_returns_more(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "return_dict_in_generate": True}))
    main = importlib.import_module("generate").main
    done = CliRunner().invoke(main, [str(folder), "--prompt", "once", "--new-tokens", "2"])
    assert (done.exit_code, "all tokens are the same" in done.stdout) == (0, True), done.output


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Directories that are no models, or others' models."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    for name in ("broken", "no_tokenizer", "other"):
        shutil.copytree(model_dir, folder / name)
    (folder / "broken" / "model.safetensors").write_bytes(b"{}" * 9)
    for file in (folder / "no_tokenizer").glob("tokenizer*"):
        file.unlink()
    without_mla().save_pretrained(folder / "other")
    return folder


@pytest.mark.parametrize(
    ("name", "words", "code", "message"),
    [
        ("empty", [], 1, "empty has no model that can be loaded: "),
        ("broken", [], 1, "broken has no model that can be loaded: Error while deserializing header"),
        ("no_tokenizer", [], 1, "no_tokenizer has no tokenizer that can be loaded: "),
        ("other", [], 1, "LlamaForCausalLM has no multi-head latent attention"),
        ("other", ["--backend", "none"], 1, "unknown backend 'none'"),
        ("nowhere", [], 2, "nowhere' does not exist"),
    ],
)
@pytest.mark.parametrize("example", ["generate", "serve_loop"])
def test_what_goes_wrong_is_one_sentence(
    bad: Path, example: str, name: str, words: list[str], code: int, message: str
) -> None:
    main = importlib.import_module(example).main
    assert message in refused(main, "--prompt", "once", *words, str(bad / name), code=code)


@pytest.mark.parametrize("example", ["generate", "serve_loop"])
def test_a_prompt_of_nothing(model_dir: Path, example: str) -> None:
    done = CliRunner().invoke(importlib.import_module(example).main, [str(model_dir), "--prompt", ""])
    assert (done.exit_code, "no tokens" in done.stderr) == (1, True)


def out_of_memory(*arguments: Any) -> None:
    torch.empty(10**15)


def without_a_word(*arguments: Any) -> None:
    raise RuntimeError


@pytest.mark.parametrize("example", ["generate", "serve_loop"])
@pytest.mark.parametrize(("kind", "method"), [(DeepseekV2ForCausalLM, "to"), (DeepseekV2MLP, "forward")])
@pytest.mark.parametrize(
    ("fail", "message"), [(out_of_memory, "can't allocate memory"), (without_a_word, "RuntimeError")]
)
def test_a_device_that_fails_is_one_sentence(
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    example: str,
    kind: type,
    method: str,
    fail: Callable[..., None],
    message: str,
) -> None:
    """When the model is moved there, and while it runs: its directory is not to blame."""
    main = importlib.import_module(example).main
    monkeypatch.setattr(kind, method, fail)
    error = refused(main, str(model_dir), "--prompt", "once", code=1)
    assert message in error
    assert "can be loaded" not in error


def test_the_prompt_comes_from_one_place(model_dir: Path, tmp_path: Path) -> None:
    main, path = importlib.import_module("generate").main, tmp_path / "prompt"
    path.write_bytes(b"\xff\xfe")
    done = CliRunner().invoke(main, [str(model_dir), "--prompt-file", str(path)])
    assert (done.exit_code, "not UTF-8 text" in done.stderr) == (1, True)
    done = CliRunner().invoke(main, [str(model_dir), "--prompt-file", str(path), "--prompt", "once"])
    assert (done.exit_code, "exclude each other" in done.stderr) == (2, True)


def test_prompts_are_served(model_dir: Path) -> None:
    main = importlib.import_module("serve_loop").main
    words = [str(model_dir), "--prompt", "once upon", "--prompt", "a time", "--new-tokens", "3"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0
    assert [line[:2] for line in done.stdout.splitlines()] == ["0:", "1:"]
    done = CliRunner().invoke(main, [*words, "--max-tokens", "3", "--new-tokens", "99"])
    assert (done.exit_code, "request 0 needs more pages" in done.stderr) == (1, True)


def test_what_the_model_generates_with_ends_a_text(model_dir: Path, tmp_path: Path) -> None:
    """Chat models end a turn with another token than a text, and name both."""
    folder = tmp_path / "model"
    shutil.copytree(model_dir, folder)
    model, tokenizer = importlib.import_module("loading").load(str(folder), "cpu")
    ids = tokenizer("once upon", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=1, do_sample=False)[0].tolist()
    model.generation_config.eos_token_id = [2, generated[-1]]
    model.generation_config.save_pretrained(folder)
    main = importlib.import_module("serve_loop").main
    done = CliRunner().invoke(main, [str(folder), "--prompt", "once upon", "--new-tokens", "40"])
    assert done.stdout == f"0: {tokenizer.decode(generated, skip_special_tokens=True)}\n"


@pytest.mark.parametrize(
    ("asked", "of_tokenizer", "expected"),
    [(None, 5, {5}), (7, 5, {7}), ([7, 8], 5, {7, 8}), (None, None, set()), (0, 5, {0})],
)
def test_the_tokens_that_end_a_text(asked: Any, of_tokenizer: int | None, expected: set[int]) -> None:
    end_tokens = importlib.import_module("loading").end_tokens
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=asked))
    assert end_tokens(model, SimpleNamespace(eos_token_id=of_tokenizer)) == expected


@pytest.mark.parametrize("name", ["generate.py", "serve_loop.py"])
def test_what_is_missing_is_one_sentence(name: str) -> None:
    """An environment made from README's first command has no `transformers`."""
    path = str(EXAMPLES / name)
    program = (
        "import runpy, sys; sys.modules['transformers'] = None; "
        f"sys.path.insert(0, {str(EXAMPLES)!r}); runpy.run_path({path!r}, None, '__main__')"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this needs transformers 5.20 or later: `pip install")
    assert len(done.stderr.strip().splitlines()) == 1


# -------------------------------------------------------------------------------------------- server
# Requests of the serving example run together, get what they get alone, and hand pages on to others.
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


@pytest.mark.parametrize("name", stock_padding.NAMES)
def test_stock_sparse_models_depend_on_padding_and_ours_do_not(name: str) -> None:
    """docs/transformers.md says so of the releases that CI installs."""
    alone, behind = stock_padding.logits(model := stock_padding.make(name))
    mended = f"transformers {transformers.__version__} is mended: docs/transformers.md and examples/ are not"
    assert (behind - alone).abs().max() > 0.01, mended
    use_mla(model)
    for ours in stock_padding.logits(model):
        torch.testing.assert_close(ours, alone, rtol=0, atol=2e-5)
