"""Several processes as one run: starting them, agreeing between them, and splitting the weights."""
