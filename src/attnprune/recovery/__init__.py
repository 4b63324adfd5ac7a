"""What is left of attention learns what the dense model does, without labels."""
