"""Text generation: continuous batching of greedy and sampled answers, beam search, reranking."""
