"""Documents, their vectors, the stores that keep them, and search."""
