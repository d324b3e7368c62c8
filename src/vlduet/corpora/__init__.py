"""Real data sets, fetched by package name and written as records with fixed splits."""
