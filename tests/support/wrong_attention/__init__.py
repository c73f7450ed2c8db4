"""Deliberately wrong attention: for every check ops that it must fail, and cousins with other numbers."""

from __future__ import annotations

from wrong_attention import conditions, expanded, habits, latent, sizes, surroundings
from wrong_attention.base import Makers

ROOMS = (latent, expanded, sizes, habits, surroundings, conditions)
CHECKS = dict.fromkeys(check for room in ROOMS for check in room.MUTANTS)
ALL: Makers = {check: [maker for room in ROOMS for maker in room.MUTANTS.get(check, [])] for check in CHECKS}
NARROW = surroundings.NARROW  # found in bfloat16 alone
