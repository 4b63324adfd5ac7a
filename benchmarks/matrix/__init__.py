"""The matrix: what holds of which model family, found by running (``make matrix``)."""
