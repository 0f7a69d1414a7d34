"""`pcpo bench`: how fast a machine samples and trains, with random weights."""
