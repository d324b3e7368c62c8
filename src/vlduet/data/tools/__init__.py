"""Commands on files of records: check, find duplicates, write negatives and composed queries."""
