"""The attention layer of `transformers` for the model's family, run one request at a time.

Position embeddings and masks are computed outside the timed region, since a model computes them once per
forward for all layers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from mla.bench.subjects.base import Facts, LayerImplementation
from mla.bench.subjects.inputs import Inputs, Turn
from mla.bench.subjects.setting import Setting
from mla.bench.subjects.transformers_classes import TransformersModel, transformers_model
from mla.bench.workload.scenario import Scenario
from mla.config import MLAConfig
from mla.errors import MLAError
from mla.verify.layer_oracle import State


class TransformersMissing(MLAError):
    """`transformers` is not installed, too old, or refuses this torch."""


class TransformersLayer(LayerImplementation):
    """The family's attention class with attention function "sdpa" or "eager"."""

    def __init__(self, setting: Setting, state: State, kind: str = "sdpa") -> None:
        super().__init__(setting)
        self.name = "transformers" if kind == "sdpa" else f"transformers-{kind}"
        self._kind = kind
        self._make_cache = require()
        self._model = _model(setting.config, kind)
        with torch.device(setting.device):
            self._layer = self._model.attention().to(setting.dtype).eval()
            self._rotary = self._model.rotary()
        self._layer.load_state_dict({key: tensor.to(setting.dtype) for key, tensor in state.items()})
        self._layer.requires_grad_(False)

    def load(self, scenario: Scenario, inputs: Inputs) -> None:
        self.prepare_buffers(scenario, inputs)
        device, dtype = self.setting.device, self.setting.dtype
        self._history = [
            (
                kv.to(device, dtype)[None, None],
                self._model.to_cache(pe).to(device, dtype)[None, None],
            )
            for kv, pe in inputs.history
        ]
        self._steps = [self._arguments(step) for step in range(scenario.inputs)]
        self.restore()

    def _arguments(self, step: int) -> list[dict[str, Any]]:
        """Return one step's arguments per request, other than the hidden states and the cache."""
        arguments = []
        for query_len, kv_len in zip(self.scenario.query_lens, self.scenario.kv_lens(step), strict=True):
            positions = torch.arange(kv_len - query_len, kv_len, device=self.setting.device)[None]
            embedding = None if self._rotary is None else self._rotary(self.hidden[:1], positions)
            mask = self._mask(query_len, kv_len)
            arguments.append({"attention_mask": mask, **self._model.arguments(embedding, positions)})
        return arguments

    def _mask(self, query_len: int, kv_len: int) -> torch.Tensor | None:
        if query_len == 1:
            return None
        device = self.setting.device
        visible = torch.ones(query_len, kv_len, dtype=torch.bool, device=device).tril(kv_len - query_len)
        if self._kind == "sdpa":
            return visible[None, None]
        least = torch.finfo(self.setting.dtype).min
        mask = torch.zeros(query_len, kv_len, dtype=self.setting.dtype, device=device)
        return mask.masked_fill_(~visible, least)[None, None]

    def restore(self, number: int = 0) -> None:
        self.take(self.begin(number))

    def take(self, turn: Turn) -> None:
        """Write the inputs of a turn, and make caches that hold the history alone: they grow."""
        super().take(turn)
        self._caches = []
        for (kv, pe), sign in zip(self._history, turn.signs.tolist(), strict=True):
            cache = self._make_cache()
            if kv.shape[2]:
                cache.update(sign * kv, sign * pe, 0)
            self._caches.append(cache)

    @torch.no_grad()
    def step(self, index: int) -> None:
        step = index if self.scenario.mode == "decode" else 0
        rows = self._x.split(self.scenario.query_lens)
        outputs = self._out.split(self.scenario.query_lens)
        requests = zip(rows, outputs, self._caches, self._steps[step], strict=True)
        for hidden, out, cache, arguments in requests:
            out.copy_(self._layer(hidden[None], cache=cache, **arguments)[0][0])

    def facts(self) -> Facts:
        loaded = self.scenario.final_lens if hasattr(self, "scenario") else ()
        return Facts(
            cache_bytes=sum(loaded) * self.setting.config.latent_dim * self.setting.dtype.itemsize,
            weight_bytes=sum(parameter.nbytes for parameter in self._layer.parameters()),
        )


def require() -> Any:
    """Return the cache class of `transformers`. Raises `TransformersMissing`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import DynamicCache, __version__
            from transformers.utils.import_utils import is_torch_available
    except ImportError as error:
        raise _missing(error) from error
    if not is_torch_available():  # each release has an oldest torch, below which it runs without models
        raise TransformersMissing(
            f"implementation 'transformers' needs a newer torch: transformers {__version__} does not work "
            f"with torch {torch.__version__}."
        )
    return DynamicCache


def _model(config: MLAConfig, kind: str) -> TransformersModel:
    """Return the classes for `config`. Raises `TransformersMissing` or `NoEquivalentClass`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return transformers_model(config, kind)
    except ImportError as error:
        raise _missing(error) from error


def _missing(error: ImportError) -> TransformersMissing:
    return TransformersMissing(
        "implementation 'transformers' needs transformers >= 5.20: "
        f"`pip install 'transformers>=5.20'` ({error})."
    )
