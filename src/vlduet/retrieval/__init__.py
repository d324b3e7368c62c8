"""Retrieval: documents, their embeddings, the index that stores them, search, and answers with sources."""
