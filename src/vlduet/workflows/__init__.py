"""Jobs over files of records that combine training, retrieval and evaluation."""
