"""Everything in this folder runs in a process of its own, whose Triton interprets kernels."""

import interpreting as interpreting  # before anything imports triton
import torch

torch.set_num_threads(1)
