"""Records, images, formats and corpora, and the way from records to batches."""
