"""What differs between families of checkpoints, a function each: they get loaded models and configs, and open nothing."""
