"""Training methods, one per file: how a record becomes sequences, and which losses are computed."""
