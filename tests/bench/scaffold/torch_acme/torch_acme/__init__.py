"""A vendor's extension of torch: importing it makes emulated cards `torch.acme`, as real ones do."""

import emulated

__version__ = "1.2"

emulated.install("acme", emulated.Card("Acme One", (1, 0), 16), count=1)


def autoload():
    """Do nothing: torch calls it after importing this module, which is what counts."""
