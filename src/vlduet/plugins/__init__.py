"""Our models in other people's harnesses; each file needs that harness to be installed."""
