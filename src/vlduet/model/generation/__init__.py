"""Text generation by a model: continuous batching, beam search, reranking of drafts."""
