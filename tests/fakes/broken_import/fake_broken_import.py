"""A backend whose SDK is missing, as its import finds out."""

raise RuntimeError("libfake.so.1 is missing\nand this line is not for users")
