"""The cards that are emulated: what their stacks report, and what their arithmetic can do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One model of card."""

    name: str
    capability: tuple[int, int]
    memory: int  # GiB
    products: tuple[str, ...] = ("bfloat16", "float16", "float32")  # dtypes whose products work
    claims_bfloat16: bool = True  # what is_bf16_supported(including_emulation=False) answers
    extra: tuple[tuple[str, object], ...] = ()  # further properties


CARDS = {
    card.name: card
    for card in (
        Card("MTT S5000", (3, 1), 80),
        Card("MTT S80", (2, 1), 16, products=("float16", "float32"), claims_bfloat16=False),
        Card("MetaX C500", (10, 0), 64),
        # The stack says no, and the products are right all the same.
        Card("Iluvatar BI-V150", (7, 1), 32, claims_bfloat16=False),
        Card("Iluvatar BI-V100", (7, 0), 32, products=("float16", "float32"), claims_bfloat16=False),
        Card(
            "NVIDIA H100 80GB HBM3",
            (9, 0),
            79,
            extra=(
                ("L2_cache_size", 50 << 20),
                ("shared_memory_per_block_optin", 227 << 10),
                ("uuid", "12345678-9abc-def0-1234-56789abcdef0"),
            ),
        ),
        Card("Tesla T4", (7, 5), 15, claims_bfloat16=False, extra=(("L2_cache_size", 4 << 20),)),
    )
}
