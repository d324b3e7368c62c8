"""Global alignment kernel (GAK): all pairs of sequences, by one of several engines."""
