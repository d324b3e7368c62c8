"""Frozen encoders that give Sugar its targets, and the models that score texts."""
