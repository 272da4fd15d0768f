"""Who runs when: jobs and tickets, the pure policy, admission, and the one thread that owns the model."""
