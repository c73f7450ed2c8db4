"""Compiling the kernels in `native/`: into a wheel by `hatch_build.py`, and at first use by `cache.py`.

These modules import the standard library and each other, relatively: a build has neither torch nor
`mla_backends`, and imports this folder without the package around it.
"""
