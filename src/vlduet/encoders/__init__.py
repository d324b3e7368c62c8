"""Models beside the trained one: frozen encoders of slices, dual encoders, and a fluency score."""
