"""Evaluation: metrics, measurement protocols, benchmarks and baselines; nothing here draws."""
