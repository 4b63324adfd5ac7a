"""The matrix: what holds of which model family, found by running (``make matrix``). Nothing is downloaded."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
