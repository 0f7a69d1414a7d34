"""`pcpo evaluate`: the quality, diversity and drift of models on equal prompts and seeds."""
