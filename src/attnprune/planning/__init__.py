"""Who decides: from a request to a plan."""
