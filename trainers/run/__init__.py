"""The training run: sample images, score them, compare the scores, and update the policy."""
