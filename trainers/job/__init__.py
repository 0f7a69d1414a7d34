"""A run's folder: the files in it, the lock on it, and the process that works in it."""
