"""Drawing: from selected data to inline SVG. Imports matplotlib."""
