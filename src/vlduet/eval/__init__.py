"""Measuring: metrics, protocols that get functions, a baseline, and the report."""
