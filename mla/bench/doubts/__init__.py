"""Evidence against a number: what makes a time doubtful although the outputs are right."""
