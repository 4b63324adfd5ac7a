"""What was asked and what was achieved, in words and pictures."""
