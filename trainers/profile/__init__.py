"""`pcpo profile`: where the time, passes and memory of a run's iterations go."""
