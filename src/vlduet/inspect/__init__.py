"""Analysis of a model or of a record."""
