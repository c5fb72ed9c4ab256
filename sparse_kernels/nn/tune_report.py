"""The account that tune gives: what was timed for each layer, and what was decided."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Source = Literal["measured", "cache", "rule", "not called"]


@dataclass(frozen=True)
class TuneRow:
    """One sparse layer.

    Attributes:
        name, kind, shape: qualified name, class, dense weight shape.
        input_shape: of the call that was timed; empty where the layer was not called.
        density: fraction of weights that exist.
        compressed_ms, dense_masked_ms, dense_ms: median milliseconds per call (forward, or forward
            and backward) in the two storages, and of torch's own layer in its best image format;
            None where not measured.
        chosen: the storage the layer now has.
        image_format: how it computes where it is dense-masked.
        break_even: density above which dense-masked is faster; what mask updates go by.
        source: "measured" now, from the "cache", by "rule" (tuning is off), or "not called" by the
            model (the layer then keeps what it had).
        settled: "certain", "equal" (a difference that does not matter) or "time" (the cap came
            first); empty where nothing was measured.
        variants: of the passes (forward, dgrad, wgrad) that do not go by the built-in rule where
            the layer is compressed, the variant and how much faster it was (time / time).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    density: float
    compressed_ms: float | None
    dense_masked_ms: float | None
    dense_ms: float | None
    chosen: str
    image_format: str
    break_even: float
    source: Source
    settled: str = ""
    variants: dict[str, tuple[str, float]] = field(default_factory=dict)


_HEAD = (
    *("layer", "weight", "input", "density", "compressed", "dense-masked", "dense"),
    *("chosen", "break-even", "variants", "from"),
)


@dataclass(frozen=True)
class TuneReport:
    """Rows in the order of ``model.named_modules()``; ``str(report)`` is a table, times in ms."""

    rows: list[TuneRow] = field(default_factory=list)

    def __iter__(self) -> Iterator[TuneRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> TuneRow:
        """The row of the layer called ``name``; KeyError lists the names there are."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; there are {', '.join(row.name for row in self.rows)}")

    def __str__(self) -> str:
        cells = [_HEAD, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_HEAD))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
        return "\n".join(line.rstrip() for line in lines)


def _cells(row: TuneRow) -> tuple[str, ...]:
    times = (row.compressed_ms, row.dense_masked_ms, row.dense_ms)
    origin = f"{row.source}, undecided" if row.settled == "time" else row.source
    return (
        row.name,
        "x".join(map(str, row.shape)),
        "x".join(map(str, row.input_shape)) or "-",
        f"{100 * row.density:.3g} %",
        *("-" if time is None else f"{time:.3f}" for time in times),
        row.chosen,
        f"{100 * row.break_even:.3g} %",
        ", ".join(f"{name} {variant}" for name, (variant, _) in row.variants.items()) or "-",
        origin,
    )
