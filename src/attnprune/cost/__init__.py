"""What a model costs: parameters, multiply-adds, latency."""
