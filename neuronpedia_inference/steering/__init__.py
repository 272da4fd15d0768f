"""What to steer (plan: plain numbers) and how it is done to a tensor (apply)."""
