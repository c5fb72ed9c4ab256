"""Single operators, as `sparse-kernels bench ops` times them, row by row into the journal."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from sparse_kernels.workbench.bench import ops
from sparse_kernels.workbench.bench.shapes import choose
from tools.gpu_bench.layers import Settings, Task

DENSITY, BATCH, SECONDS = 0.05, 128, 2.0


def operators(settings: Settings) -> Iterator[Task]:
    """Each pass of the core layers in elements, norm and pooling; launches included in the time."""
    size = "small" if settings.small else "core"
    found = ops.tasks(choose((), size), size, DENSITY, ("1x1",), BATCH, settings.device)
    for key, make in found:
        yield key, functools.partial(_row, make, settings)


def _row(make: Any, settings: Settings) -> dict[str, Any]:
    row = ops._measure(make(), settings.rounds, SECONDS, settings.device)
    return {"operator": row}
