"""What will run: options, judged and resolved before anything is measured."""
