"""Global alignment kernel (GAK) of sequences of slices: public functions and engines."""
