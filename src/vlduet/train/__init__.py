"""The training loop and what it stands on: step, optimiser, state."""
