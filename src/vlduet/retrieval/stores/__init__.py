"""Vector stores: the interface that an index uses, and its implementation with LanceDB."""
