"""`transformers` as an oracle: whether it takes this torch, and DeepSeek-V3's classes.

Each release has an oldest torch, below which it only reads configs. Importing the classes from here leaves a
test file out there, and `needs_transformers` a test.
"""

from __future__ import annotations

import pytest

from mla.bench.subjects.transformers_layer import TransformersMissing, require

try:
    require()
    REFUSAL = ""
except TransformersMissing as error:
    REFUSAL = str(error)

needs_transformers = pytest.mark.skipif(bool(REFUSAL), reason=REFUSAL)


def __getattr__(name: str) -> object:
    """Return a class of DeepSeek-V3; leave the importing file out where there is none."""
    if not name.startswith("DeepseekV3"):
        raise AttributeError(name)
    if REFUSAL:
        pytest.skip(REFUSAL, allow_module_level=True)
    from transformers.models.deepseek_v3 import configuration_deepseek_v3, modeling_deepseek_v3

    return getattr(configuration_deepseek_v3 if name.endswith("Config") else modeling_deepseek_v3, name)
