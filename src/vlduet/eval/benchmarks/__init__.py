"""Published benchmarks: loaders of their official formats, their prompts and their official scoring."""
