"""Readers of other formats: containers give rows, schemas give records."""
