"""Training: start with `loop.py`; `setup.py` builds its objects, and `step.py` is one step."""
