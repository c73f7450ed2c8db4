"""FlashInfer's `BatchMLAPagedAttentionWrapper`: ragged absorbed attention, causal, on pages of any size."""

from mla_backends.kernels.flashinfer.op import LIMITS, FlashInferMla, compiled_kernels

__all__ = ["LIMITS", "FlashInferMla", "compiled_kernels"]
