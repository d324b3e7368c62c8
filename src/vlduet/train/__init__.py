"""Training: `loop.py` reads from top to bottom, `setup.py` builds its objects, `step.py` is one step."""
