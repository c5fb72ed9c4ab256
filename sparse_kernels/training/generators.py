"""The global random generators of torch, numpy and Python as plain data, and back.

`nn.Dropout` of this package draws the seed of its Philox masks from torch's, so it has no state of
its own.
"""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from torch import Tensor

from sparse_kernels.nn._checkpoint import CheckpointError

from .process_group import Group

_NUMPY = "MT19937"  # numpy.random's global generator is always this one
_NUMPY_KEYS = 624


def state() -> dict[str, Any]:
    """State of all of them; of CUDA's where CUDA has been used."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_initialized() else [],
        "numpy": _numpy_state(),
        "python": random.getstate(),
    }


def _numpy_state() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
    return {
        "generator": str(name),
        "keys": [int(key) for key in keys],
        "position": int(position),
        "has_gauss": int(has_gauss),
        "gauss": float(gauss),
    }


def of_all_ranks(job: Group | None) -> dict[str, Any]:
    """Checkpoint entries "generators" (rank 0's) and "rank_generators" (the others', if any)."""
    if job is None:
        return {"generators": state()}
    first, *others = job.gathered(state())
    return {"generators": first, "rank_generators": others}


def of_rank(held: Any, others: Any, rank: int, world: int) -> Any:
    """The state for this rank; held: rank 0's, others: those of ranks 1, 2, ...

    Raises CheckpointError unless they are the states of `world` ranks; a single process takes
    rank 0's.
    """
    count = 1 + len(others) if isinstance(others, list) else 1
    if world > 1 and count != world:
        raise CheckpointError(
            f"expected the generators of {world} ranks, it holds those of {count}; start as many "
            "ranks as wrote it"
        )
    return held if rank == 0 else others[rank - 1]


def check(held: Any) -> None:
    """Raise CheckpointError if `held` is not what `state` gives; tried on generators of its own."""
    try:
        torch.Generator().set_state(_bytes(held["torch"]))
        for entry in held["cuda"]:
            _bytes(entry)
        numpy.random.RandomState().set_state(_numpy_tuple(held["numpy"]))
        random.Random().setstate(held["python"])
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(
            f"expected the states of random generators, got a fault: {type(error).__name__}: "
            f"{error}"
        ) from error


def restore(held: dict[str, Any]) -> None:
    """Set the generators to what `check` has found right."""
    torch.set_rng_state(held["torch"])
    if held["cuda"] and torch.cuda.is_available():
        # A machine with another number of devices: those that both have.
        for device, entry in enumerate(held["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(entry, device)
    numpy.random.set_state(_numpy_tuple(held["numpy"]))
    random.setstate(held["python"])


def _bytes(entry: Any) -> Tensor:
    if not isinstance(entry, Tensor) or entry.dtype != torch.uint8:
        raise TypeError(f"a generator's state must be an uint8 tensor, got {type(entry).__name__}")
    return entry


def _numpy_tuple(held: Any) -> tuple[str, Any, int, int, float]:
    if held["generator"] != _NUMPY:
        raise ValueError(f"numpy's global generator is {_NUMPY}, not {held['generator']!r}")
    keys = numpy.array(held["keys"], dtype=numpy.uint32)
    if keys.shape != (_NUMPY_KEYS,) or not 0 <= held["position"] <= _NUMPY_KEYS:
        raise ValueError(f"{_NUMPY} has {_NUMPY_KEYS} keys and a position among them")
    return (_NUMPY, keys, held["position"], held["has_gauss"], held["gauss"])
