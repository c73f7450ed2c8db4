"""The commands of `python -m mla.bench`, one file each."""
