"""Losses as pure functions of tensors; nothing here knows of models, records or processes other than by numbers."""
