"""Makes the torch of this process look like a vendor's CUDA-like build, with emulated cards as `torch.cuda`.

Environment: EMULATED_BUILD is a key of BUILDS, EMULATED_COUNT is how many cards there are.
"""

import os

import emulated
import torch
from torch.torch_version import TorchVersion

# build -> (suffix of torch.__version__, torch.version.cuda, card)
BUILDS = {
    "nvidia": ("+cu128", "12.8", "NVIDIA H100 80GB HBM3"),
    "metax": ("+metax3.3.0.2", "11.6", "MetaX C500"),
    "iluvatar": ("a0+git1234567", "10.2", "Iluvatar BI-V150"),
}


def _autoload():
    build = os.environ["EMULATED_BUILD"]
    suffix, cuda, card = BUILDS[build]
    torch.__version__ = TorchVersion(str(torch.__version__).partition("+")[0] + suffix)
    torch.version.cuda, torch.version.hip = cuda, None
    if build == "iluvatar":
        torch.corex = True
    emulated.install("cuda", emulated.CARDS[card], int(os.environ.get("EMULATED_COUNT", "2")))
