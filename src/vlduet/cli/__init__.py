"""Command line: thin commands, and the only place that prints results and exits."""
