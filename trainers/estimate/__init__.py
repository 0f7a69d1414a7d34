"""What a run will take, memory and time, reckoned before it starts and without torch."""
