"""What a run, a comparison and the limits look like in a terminal."""
