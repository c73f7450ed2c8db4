"""One call of an op of the contract: drawn, known in float64, placed in memory, called, varied and judged.

`KINDS` has an entry for each kind of op, and everything else asks it: a new op of the contract is one more.
"""

from mla.cases import kinds, sparse
from mla.cases.case import KINDS

__all__ = ["KINDS", "kinds", "sparse"]
