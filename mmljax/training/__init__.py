"""The training loop, its step, the optimiser and checkpoints."""
