"""Ways to use this project's ops from other frameworks, and whether there is a `transformers` to serve."""

from __future__ import annotations

import torch

OLDEST = (5, 20)  # as pyproject.toml says, and tests run


def require_transformers() -> None:
    """Raise `ImportError`, in one sentence, where it is missing, too old, or refuses this torch."""
    wanted = ".".join(map(str, OLDEST))
    needs, remedy = f"this needs transformers {wanted} or later", f"`pip install 'transformers>={wanted}'`"
    try:
        from transformers import __version__
        from transformers.utils.import_utils import is_torch_available
    except ImportError as error:
        raise ImportError(f"{needs}: {remedy} ({error}).") from error
    if tuple(map(int, __version__.split(".")[:2])) < OLDEST:
        raise ImportError(f"{needs}, and {__version__} is installed: {remedy}.")
    if not is_torch_available():  # each release has an oldest torch, below which it runs without models
        raise ImportError(
            f"transformers {__version__} does not work with torch {torch.__version__}: install a newer torch."
        )
