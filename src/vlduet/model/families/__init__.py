"""Differences between VLM families, one small class each; these modules open no files."""
