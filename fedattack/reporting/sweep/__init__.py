"""The page of a sweep: table, figures, page."""
