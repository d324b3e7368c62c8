"""Endpoints of the server, one per file: the schema of its body and responses, and its route."""
