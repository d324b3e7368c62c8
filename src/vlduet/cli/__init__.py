"""The command line: thin verbs, and the only place that prints errors and exits."""
