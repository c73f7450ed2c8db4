"""Backends that cheat, and honest ones that look like it: what a number must withstand.

All of them are the reference behind the contract. A cheat overrides what it lies about (`call`,
`synchronize`, `timer`, `graph`, ...) and counts in `gains` the calls it did not really make. Its numbers are
arguments, so that cousins of a cheat are tried as well as the cheat.
"""
