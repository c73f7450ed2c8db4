"""What comes from outside: files that somebody else may have made, and words that are read from them."""

from mla_backends.outside.files import inside, read, start, wait
from mla_backends.outside.text import escaped, quoted, safe, shortened

__all__ = ["escaped", "inside", "quoted", "read", "safe", "shortened", "start", "wait"]
