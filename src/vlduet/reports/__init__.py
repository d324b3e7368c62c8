"""HTML pages, charts and terminal tables drawn from results."""
