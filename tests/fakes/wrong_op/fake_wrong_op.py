"""The CPU with a fused `latent_attention` that fails in the way `-O fault=...` names.

none: it is right. drop: it never sees the last key. nan: it writes NaN. late: it is right for the first
`after` calls and drops the last key from then on. spec: it refuses every layer. batch: it refuses every
batch. raise: it raises from the call number `after` on. hang: it does not return from then on. inside: torch
raises in Python that the op calls.
"""

import time

from mla_backends import Availability, Backend, BackendError, FusedOp, hookimpl

FAULTS = ("none", "drop", "nan", "late", "spec", "batch", "raise", "hang", "inside")


def normalized(x):
    import torch

    return torch.nn.functional.layer_norm(x, "wide")


class LoopAttention(FusedOp):
    """Absorbed attention, one query at a time."""

    contract = "latent_attention/1"
    nan_safe_tail = True

    def __init__(self, fault, after, tokens):
        self._fault = fault
        self._after = after
        self._tokens = tokens  # counted are calls of so many, if not of any number

    def unsupported_reasons(self, spec):
        return [f"it has no kernel for {spec.num_heads} heads"] if self._fault == "spec" else []

    def unsupported_batch(self, spec, query_lens, kv_lens, page_size=None):
        return [f"{len(kv_lens)} requests are too many"] if self._fault == "batch" else []

    def prepare(self, spec, batch):
        return batch.query_lens, batch.kv_lens

    def __call__(self, state, *, q, cache, block_table, kv_lens, cu_q, softmax_scale, out, lse):
        self._after -= self._tokens in (0, len(q))
        if self._fault == "raise" and self._after < 0:
            raise RuntimeError("the device ran out of memory\nin 3 lines\nof text")
        if self._fault == "hang" and self._after < 0:
            time.sleep(3600)
        if self._fault == "inside":
            normalized(q)
        dropped = 1 if self._fault == "drop" or (self._fault == "late" and self._after < 0) else 0
        token = 0
        for request, (query_len, kv_len) in enumerate(zip(*state, strict=True)):
            rows = cache[block_table[request].long()].flatten(0, 1).float()
            for visible in range(kv_len - query_len + 1, kv_len + 1):
                keys = rows[: visible - dropped]
                logits = q[token].float() @ keys.T * softmax_scale
                out[token] = logits.softmax(-1) @ keys[:, : out.shape[2]]
                lse[token] = logits.logsumexp(-1)
                token += 1
        if self._fault == "nan":
            out[-1, -1, -1] = float("nan")


class WrongOp(Backend):
    name = "fake-wrong-op"
    api_version = 1

    @classmethod
    def known_options(cls):
        return ("threads", "fault", "after", "tokens")

    def probe(self):
        return Availability(ok=True)

    def setup(self, index=None):
        import torch

        if self.options.get("fault", "drop") not in FAULTS:
            raise BackendError(f"backend '{self.name}' knows these faults: {', '.join(FAULTS)}.")
        torch.set_num_threads(1)
        return torch.device("cpu")

    def synchronize(self):
        pass

    def ops(self):
        numbers = (int(self.options.get(name, "0")) for name in ("after", "tokens"))
        return {"loop": LoopAttention(self.options.get("fault", "drop"), *numbers)}


@hookimpl
def mla_backend(options):
    return WrongOp(options)
