"""attnprune in other people's training loops; each module here needs the framework of its name.

None of them is imported by ``import attnprune``: write ``from attnprune.integrations.transformers import ...``.
"""
