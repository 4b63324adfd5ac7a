"""What forward passes take: measured once for the shapes that plans may choose, predicted for all."""

from .measuring import measure, measure_plan, shaped, slower_because
from .table import Grid, LatencyTable

__all__ = ["Grid", "LatencyTable", "measure", "measure_plan", "shaped", "slower_because"]
