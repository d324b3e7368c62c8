"""A method each: how a record is laid out into sequences, and which losses the readings give."""
