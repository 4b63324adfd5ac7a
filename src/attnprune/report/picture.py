"""The figure of all pictures, which a notebook shows (:class:`Picture`); needs matplotlib."""

from __future__ import annotations

from io import BytesIO

from matplotlib.figure import Figure


class Picture(Figure):
    """A ``matplotlib.figure.Figure`` that a notebook's cell shows as what it returns: once, and from the first cell on.

    pyplot does not know it: it would choose a backend, and a notebook show the figure a second time when the cell ends.
    """

    def _repr_png_(self) -> bytes:
        file = BytesIO()
        self.savefig(file, format="png", dpi=110)
        return file.getvalue()
