"""Adapters from vendors' kernels to the contract's attention ops, for plugins to offer in `ops()`.

A plugin declares what the kernel can do on its devices, as data, and offers the op; nothing is imported until
a layer is built, and a package that is missing, broken or changed becomes a reason in `--list-ops`::

    from mla_backends.kernels import FlashMla, LatentLimits

    def hopper_only(device):
        capability = torch.cuda.get_device_capability(device)
        return "" if capability == (9, 0) else f"it needs compute capability 9.0, not {capability}"

    class Acme(TorchBackend):
        def ops(self):
            limits = LatentLimits(page_sizes=(64,), device_reason=hopper_only)
            return {"flash_mla": FlashMla(limits, install="pip install flash-mla")}

| adapter | attention | package | `lse` | in a captured graph |
|---|---|---|---|---|
| `FlashMla` | latent | `flash_mla`, `mate.flashmla` | yes | plans inside the graph, or `graph=False` |
| `FlashMlaSparse` | latents that are selected | `flash_mla`, `mate.flashmla` | yes | yes, or `graph=False` |
| `FlashInferSparse` | latents that are selected | `flashinfer` from 0.7.4 on | yes | yes |
| `TokenspeedMla` | latent | `tokenspeed_mla` | yes | makes its table inside the graph |
| `IxformerMla` | latent | `ixformer` | newer releases; else NaN | bounded by the block table |
| `FlashInferMla` | latent | `flashinfer` from 0.6.11 on | yes | refused: it plans on the host |
| `SdpaExpanded` | expanded | torch itself | no: NaN | keeps the lengths of its plan |
| `TokenspeedPrefill` | expanded | `tokenspeed_mla` | yes | keeps the lengths of its plan |
| `TorchVarlen` | expanded | torch itself | yes | keeps the lengths of its plan |
| `FlashAttnVarlen` | expanded | `flash_attn`, `flash_attn_interface` | yes | keeps the lengths of its plan |

One op object serves all layers; keep it, because it holds scratch memory and the vendor's workspace. Do
not use an op on two streams at a time. To serve another kernel over pages, subclass `PagedLatentOp`.
"""

from mla_backends.kernels.expanded import FlashAttnVarlen, SdpaExpanded, TorchVarlen, VarlenLimits
from mla_backends.kernels.flashinfer import FlashInferMla
from mla_backends.kernels.latent import FlashMla, IxformerMla
from mla_backends.kernels.paged import LatentLimits, PagedLatentOp
from mla_backends.kernels.sparse import FlashInferSparse, FlashMlaSparse
from mla_backends.kernels.tokenspeed import TokenspeedMla, TokenspeedPrefill
from mla_backends.kernels.vendor import KernelRefused

__all__ = [
    "FlashAttnVarlen", "FlashInferMla", "FlashInferSparse", "FlashMla", "FlashMlaSparse", "IxformerMla",
    "KernelRefused", "LatentLimits", "PagedLatentOp", "SdpaExpanded", "TokenspeedMla", "TokenspeedPrefill",
    "TorchVarlen", "VarlenLimits",
]  # fmt: skip
