"""What both commands share: console, exit codes, signals, progress, launchers, files."""
