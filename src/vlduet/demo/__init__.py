"""The main job, end to end: ``vlduet demo``, and so ``make demo``."""
