"""What this machine can do at most, measured: multiplications by a large sgemm, bytes by streams.

Source of the model: Williams, Waterman & Patterson 2009, Roofline (CACM 52/4).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..timing import interleave
from .shapes import LayerShape, compulsory_bytes

_SIDES = (1024, 2048, 3072)
_STREAM_FLOATS = 64 * 2**20  # 256 MiB a stream: beyond every cache
_ROUNDS = 5
#: A layer's target: so many times dense, or this share of its roofline gain if that is less.
TARGET_SPEEDUP, TARGET_SHARE = 4.0, 0.7


def measure() -> dict[str, Any]:
    """{"fma_per_second", "bytes_per_second", "how"}, with torch's threads, the best of a few.

    Peak: torch.mm of square float32 matrices (the best of three sizes), side^3 multiply-adds each;
    a product that a library reaches is a fairer ceiling than the data sheet's clock. Bandwidth:
    the better of copy (reads + writes) and add (two reads + a write) over 256 MiB streams, counting
    the bytes named and not what the cache fetches before it writes.
    """
    a, b, out = (torch.randn(max(_SIDES), max(_SIDES)) for _ in range(3))
    products = {
        str(side): partial(
            torch.mm, a[:side, :side].contiguous(), b[:side, :side].contiguous(),
            out=out.view(-1)[: side * side].view(side, side),
        )
        for side in _SIDES
    }  # fmt: skip
    gemm = interleave(products, _ROUNDS, 1)
    # The fastest sample: a ceiling is what was reached at all, and errs against ourselves.
    peak = max(int(side) ** 3 / min(t.samples) for side, t in gemm.items())
    x, y, z = (torch.ones(_STREAM_FLOATS) for _ in range(3))
    streams = interleave(
        {"copy": partial(z.copy_, x), "add": partial(torch.add, x, y, out=z)}, _ROUNDS, 1
    )
    moved = {"copy": 8 * _STREAM_FLOATS, "add": 12 * _STREAM_FLOATS}
    band = {name: moved[name] / min(t.samples) for name, t in streams.items()}
    return {
        "fma_per_second": peak,
        "bytes_per_second": max(band.values()),
        "how": f"peak: best of torch.mm {', '.join(map(str, _SIDES))} cubed, float32; bandwidth: "
        f"best of copy ({band['copy'] / 1e9:.1f} GB/s) and add ({band['add'] / 1e9:.1f} GB/s) "
        "over 256 MiB streams, bytes read + bytes written",
    }


def limits(
    shape: LayerShape, batch: int, nnz: int, dense_seconds: float, machine: dict[str, Any]
) -> dict[str, Any]:
    """The roofline of forward + backward: counts, least seconds, gain over dense, target.

    gain = dense seconds / max(useful multiply-adds / peak, compulsory bytes / bandwidth).
    """
    products = 3 * nnz * shape.positions * batch
    moved = compulsory_bytes(shape, batch, nnz)["total"]
    arithmetic = products / machine["fma_per_second"]
    memory = moved / machine["bytes_per_second"]
    gain = dense_seconds / max(arithmetic, memory)
    return {
        "fma": products,
        "bytes": moved,
        "roofline_seconds": max(arithmetic, memory),
        "bound": "arithmetic" if arithmetic >= memory else "memory",
        "roofline_gain": gain,
        "target": min(TARGET_SPEEDUP, TARGET_SHARE * gain),
    }
