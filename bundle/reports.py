"""Whether what stands in a bundle's reports is what a reader expects there."""

from __future__ import annotations

import math
from typing import Any


def is_report(report: Any) -> bool:
    """Whether this tells what stays in fp32."""
    islands = report.get("islands") if isinstance(report, dict) else None
    counts = report.get("nodes") if isinstance(report, dict) else None
    return (
        isinstance(islands, list)
        and all(isinstance(island, dict) and isinstance(island.get("node"), str) for island in islands)
        and isinstance(counts, dict)
        and all(isinstance(counts.get(name), int) for name in ("low", "kept"))
    )


def is_quality(quality: Any) -> bool:
    """Whether this tells how far images are from fp32."""
    distance = quality.get("psnr_db") if isinstance(quality, dict) else None
    return isinstance(distance, (int, float)) and math.isfinite(distance)
