"""The nouns: frozen values that say what an attention is, what was asked, and what goes."""
