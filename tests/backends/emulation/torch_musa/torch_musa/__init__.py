"""Stands in for Moore Threads' torch_musa: importing it makes the emulated cards `torch.musa`.

Environment: EMULATED_COUNT is how many cards there are; EMULATED_FAULT=import raises as a torch_musa for
another torch does.
"""

import os
from types import SimpleNamespace

import emulated
import torch

__version__ = "2.7.1"

if os.environ.get("EMULATED_FAULT") == "import":
    raise ImportError("torch_musa 2.7.1 needs torch 2.7.1\nplease install a matching torch")

emulated.install("musa", emulated.CARDS["MTT S5000"], int(os.environ.get("EMULATED_COUNT", "2")))
torch.version.musa = "4.3.6"
torch.backends.mudnn = SimpleNamespace(allow_tf32=True)


def _autoload():
    """Do nothing: torch calls it after importing this module, which is what counts."""
