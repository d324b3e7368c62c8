"""Real data sets that are installed by package name and written as records."""
