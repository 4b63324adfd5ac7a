"""Pruning inside training loops."""
