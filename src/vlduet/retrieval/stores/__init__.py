"""Storage of vectors and their rows on disk."""
