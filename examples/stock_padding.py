"""Show how left padding changes what `transformers` computes for DeepSeek-V3.2 and GLM-5.

    python examples/stock_padding.py

Needs torch and transformers, nothing of this project. The same prompt runs alone and behind padding: logits
should agree to rounding, about 1e-6. Of keys that an indexer scores alike, as all heads' ReLUs give 0,
`torch.topk` takes whichever it meets first, and padding changes that. No padding is attended.
"""

import sys
from typing import Any

import torch
import transformers

NAMES = ("DeepseekV32", "GlmMoeDsa")
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 48}
HEADS = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
INDEXER = {"index_topk": 4, "index_n_heads": 1, "index_head_dim": 16}
LAYERS = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 100}
DENSE = {"first_k_dense_replace": 2, "mlp_layer_types": ["dense", "dense"], "initializer_range": 0.12}
PADDING = 20


def make(name: str) -> Any:
    """Return a tiny random model whose indexer scores many keys 0."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**ATTENTION, **HEADS, **INDEXER, **LAYERS, **DENSE)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


@torch.no_grad()
def logits(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits [tokens, vocabulary] of a prompt alone, and behind padding."""
    prompt = torch.randint(3, 100, (1, 30), generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(prompt, (PADDING, 0))
    behind = model(padded, attention_mask=(padded > 0).long()).logits
    return model(prompt).logits[0], behind[0, PADDING:]


if __name__ == "__main__":
    sys.stdout.write(f"transformers {transformers.__version__}, behind {PADDING} tokens of padding:\n")
    for name in NAMES:
        alone, behind = logits(make(name))
        worst = (behind - alone).abs().max()
        sys.stdout.write(f"{name}: logits up to {alone.abs().max():.1f} are up to {worst:.1e} off\n")
