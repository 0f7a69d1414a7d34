"""The guard of a run: measures of drift and diversity, and the rules that pause or stop it."""
