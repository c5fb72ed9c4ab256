"""The account that sparsify gives: what was kept, replaced or skipped, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Action = Literal["sparsified", "kept", "replaced", "fused", "skipped"]


@dataclass(frozen=True)
class SparsifyRow:
    """One module: its qualified name, kind, weight shape, and what happened to it.

    ``density`` and ``nnz`` are those after the call: elements that exist.  ``action`` is
    "sparsified" (became a sparse layer), "kept" (was sparse already), "replaced" (norm or pooling
    that keeps the layout, or dropout), "fused" (a ReLU or pooling computed by the norm before it)
    or "skipped" (left dense); ``reason`` says why, or in which storage.  ``block`` is the (rows,
    columns) of a sparse layer's blocks, None for other modules.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    density: float
    nnz: int
    action: Action
    reason: str = ""
    block: tuple[int, int] | None = None

    @property
    def numel(self) -> int:
        """Number of elements of the dense weight (0 for modules without one)."""
        total = 1 if self.shape else 0
        for side in self.shape:
            total *= side
        return total


@dataclass(frozen=True)
class SparsifyReport:
    """All rows in the order of ``model.named_modules()``; ``str(report)`` is a table."""

    rows: list[SparsifyRow] = field(default_factory=list)

    def __iter__(self) -> Iterator[SparsifyRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> SparsifyRow:
        """The row of the module called ``name``; KeyError lists the names there are."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    def _sparse(self) -> list[SparsifyRow]:
        return [row for row in self.rows if row.action in ("sparsified", "kept")]

    @property
    def nnz(self) -> int:
        """Weights that exist in the sparse layers."""
        return sum(row.nnz for row in self._sparse())

    @property
    def numel(self) -> int:
        """Weights that the sparse layers would have if they were dense."""
        return sum(row.numel for row in self._sparse())

    @property
    def density(self) -> float:
        """nnz / numel over the sparse layers; 1.0 if there is none."""
        return self.nnz / self.numel if self.numel else 1.0

    @property
    def overall_density(self) -> float:
        """The same over all linear and convolution weights, skipped layers counted as dense."""
        weights = [row for row in self.rows if row.numel]
        total = sum(row.numel for row in weights)
        return sum(row.nnz for row in weights) / total if total else 1.0

    def __str__(self) -> str:
        header = ("layer", "kind", "shape", "block", "density", "nnz", "action", "reason")
        table = [header] + [
            (
                row.name,
                row.kind,
                "x".join(map(str, row.shape)),
                "" if row.block is None else "x".join(map(str, row.block)),
                f"{row.density:.4f}" if row.numel else "",
                f"{row.nnz}" if row.numel else "",
                row.action,
                row.reason,
            )
            for row in self.rows
        ]
        widths = [max(len(line[i]) for line in table) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
            for line in table
        ]
        lines.append(
            f"{self.nnz} of {self.numel} weights exist in the sparse layers (density "
            f"{self.density:.4f}); {self.overall_density:.4f} with the layers left dense"
        )
        return "\n".join(lines)
