"""Retrieval: documents, their embeddings in an index, search, and answers with sources."""
