"""Adapters of a model to evaluation harnesses."""
