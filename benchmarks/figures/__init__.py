"""The figures of README and documentation: what makes them, and where they stand."""
