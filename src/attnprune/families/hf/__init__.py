"""Attention of Hugging Face transformers."""
