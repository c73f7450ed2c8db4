"""Mistakes that kernels are made with: each must turn a check red."""

from mutants.expanded import EXPANDED
from mutants.formats import FORMATS, STORED
from mutants.latent import LATENT, SELECTED
from mutants.selection import SELECTION
from mutants.shared import PLACES, SOFTMAX
from mutants.small import SMALL

__all__ = ["EXPANDED", "FORMATS", "LATENT", "PLACES", "SELECTED", "SELECTION", "SMALL", "SOFTMAX", "STORED"]
