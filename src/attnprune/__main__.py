"""``python -m attnprune``: the same as the command ``attnprune``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
