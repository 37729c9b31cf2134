"""The training run: plan, loop, optimizer, checkpoints, metrics and where they go."""
