"""One of two distributions that offer one name; neither may be imported."""

raise RuntimeError("imported, although the choice is ambiguous")
