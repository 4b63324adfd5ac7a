"""attnprune in other people's training loops and beside other pruners; each module needs the framework of its name.

None of them is imported by ``import attnprune``: write ``from attnprune.integrations.transformers import ...``.
"""
