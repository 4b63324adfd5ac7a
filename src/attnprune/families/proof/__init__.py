"""Proof that a module is what its family says: both are run side by side on random weights and inputs.

A family proposes; :func:`attnprune.families.proof.verdict.verdict_of` decides how a module may run.
"""
