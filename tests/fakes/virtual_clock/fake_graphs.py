"""Graphs for the CPU: calls of torch are noted while a function runs, and repeated on the same memory.

As on a real device only kernels are repeated: what the host decided, and numbers it made, are frozen.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mla_backends import FusedOp


def _tensors(*values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Recorder(TorchDispatchMode):
    """Notes every call, with what it was given and the memory it made."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def capture(fn, replays=None):
    """Return the replay of `fn`; after so many `replays` it does nothing any more."""
    for _ in range(3):
        fn()
    recorder = Recorder()
    with recorder:
        fn()
    left = [replays]

    def replay():
        if left[0] is not None:
            left[0] -= 1
            if left[0] < 0:
                return
        recorder.replay()

    return replay


class Follows:
    """A state that keeps nothing of the host."""

    graph_safe = True


class DenseAttention(FusedOp):
    """Absorbed attention over whole block tables, with lengths read on the device."""

    contract = "latent_attention/1"
    nan_safe_tail = True

    def prepare(self, spec, batch):
        return Follows()

    def __call__(self, state, *, q, cache, block_table, kv_lens, cu_q, softmax_scale, out, lse):
        rows = cache[block_table.long()].flatten(1, 2).float()  # [B, m, c + r]
        keys = torch.arange(rows.shape[1])
        rows = torch.where((keys < kv_lens[:, None])[..., None], rows, 0)
        tokens = torch.arange(q.shape[0])
        request = torch.searchsorted(cu_q[1:].contiguous(), tokens.int(), right=True)
        visible = kv_lens[request] - cu_q[1:][request] + tokens + 1
        seen = rows[request]  # [T, m, c + r]
        logits = torch.einsum("thw,tmw->thm", q.float(), seen) * softmax_scale
        logits = logits.masked_fill((keys >= visible[:, None])[:, None], float("-inf"))
        out.copy_(torch.einsum("thm,tmw->thw", logits.softmax(-1), seen[..., : out.shape[2]]))
        lse.copy_(logits.logsumexp(-1))
