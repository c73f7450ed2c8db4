"""Result files as one HTML page that needs no network, no script and no torch."""
