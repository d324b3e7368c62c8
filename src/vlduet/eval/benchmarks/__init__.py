"""Published benchmarks: loaders of their official formats, their prompts and scoring rules."""
