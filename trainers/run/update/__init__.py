"""How an iteration moves the policy: its objective, gradients in one pass or two, AdamW's step."""
