"""Which backend serves an operator: the first that supports the tensors, with reasons otherwise.

The choice depends on device, dtypes and block only, so it is made once per combination.  Backends
are modules with functions of the operators' names; ``supports`` of each says why it cannot serve.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from sparse_kernels.backends import cpu, cuda, reference, torch_ops, triton
from sparse_kernels.backends.triton.operands import allows_tf32

#: In the order in which they are asked. The room of Triton imports triton when it is called.
BACKENDS: dict[str, ModuleType] = {
    "cpu": cpu,
    "cuda": cuda,
    "triton": triton,
    "torch": torch_ops,
    "reference": reference,
}

Block = tuple[int, int]

_forced: str | None = os.environ.get("SPARSE_KERNELS_BACKEND") or None
_cache: dict[tuple[object, ...], ModuleType] = {}


class BackendError(RuntimeError):
    """No backend can compute an operator for the given tensors; the message lists why."""


def _forced_backends() -> list[str]:
    names = _forced.split(",") if _forced else []
    for name in names:
        if name not in BACKENDS:
            raise BackendError(
                f"SPARSE_KERNELS_BACKEND={_forced!r}: {name!r} is no backend: choose one of "
                f"{', '.join(BACKENDS)}, or several with commas between"
            )
    return names


def forced() -> str | None:
    """Name of the backend that the environment or ``use_backend`` asks for, if any.

    Several names, in the order in which they are asked, have commas between.
    """
    return _forced


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serve every operator by one backend inside a ``with`` block (tests, comparisons).

    Or by the first of several that serves it: "triton,torch". Raises BackendError for a name that
    is not in ``BACKENDS``.
    """
    global _forced
    before = _forced
    _forced = name
    try:
        for one in name.split(","):
            if one not in BACKENDS:
                raise BackendError(f"{one!r} is no backend: choose one of {', '.join(BACKENDS)}")
        yield
    finally:
        _forced = before


def reasons(
    op: str, x: torch.Tensor, values: torch.Tensor | None = None, block: Block | None = None
) -> dict[str, str | None]:
    """For each backend None if it serves ``op`` on these tensors, else the reason why not."""
    if values is not None:
        block = (int(values.shape[1]), int(values.shape[2]))
    found: dict[str, str | None] = {}
    for name, module in BACKENDS.items():
        if not hasattr(module, op):
            found[name] = f"has no {op}"
        else:
            found[name] = module.supports(op, x, values, block)
    # The reference expands the weight.  It is the oracle, and the home of float64; to serve
    # float32 by it would be dense computation behind a sparse name.
    asked = _forced_backends()
    if found["reference"] is None and x.dtype != torch.float64 and "reference" not in asked:
        found["reference"] = (
            "computes with the dense weight, so it serves float64 only unless "
            "SPARSE_KERNELS_BACKEND=reference asks for it"
        )
    # Until both are timed on a GPU: the native kernels use plain cores for vectors, and those for
    # blocks are a second opinion on Triton's.
    both = found["cuda"] is None and found["triton"] is None and "cuda" not in asked
    if both and _on_tensor_cores(op, x.dtype, block):
        found["cuda"] = (
            "leaves what tensor cores multiply to Triton until both are timed on a GPU, unless "
            "SPARSE_KERNELS_BACKEND=cuda asks for it"
        )
    if found["torch"] is None and x.device.type == "cpu" and "torch" not in asked:
        found["torch"] = (
            "serves CUDA tensors, and the CPU's only where SPARSE_KERNELS_BACKEND names it"
        )
    return found


def choose(
    op: str, x: torch.Tensor, values: torch.Tensor | None = None, block: Block | None = None
) -> ModuleType:
    """The backend module that serves operator ``op`` on tensors like ``x`` and ``values``.

    ``block`` stands for values [capacity, *block] where an operator makes them: weight gradients.
    Raises BackendError that lists every backend's reason when none does.
    """
    # On the way of every operator, so no more than a dictionary look-up.
    if values is None:
        key: tuple[object, ...] = (op, _forced, x.device, x.dtype, block, _tf32(op, x, block))
    else:
        _, bh, bw = values.shape  # symbolic in a trace, which would not hash
        block = (int(bh), int(bw))
        key = (op, _forced, x.device, x.dtype, values.dtype, block, _tf32(op, x, block))
    module = _cache.get(key)
    if module is None:
        module = _cache[key] = _choose(op, _forced_backends(), x, values, block)
    return module


def _tf32(op: str, x: torch.Tensor, block: Block | None) -> bool:
    """Whether torch allows TF32: who serves float32 blocks on a GPU may depend on it."""
    if x.dtype is not torch.float32 or x.device.type != "cuda" or not _tall(block):
        return False
    return allows_tf32(op)


def _tall(block: Block | None) -> bool:
    """Whether tensor cores have work in such blocks."""
    return block is not None and block[0] >= 8


def _on_tensor_cores(op: str, dtype: torch.dtype, block: Block | None) -> bool:
    """Whether Triton multiplies such blocks by the tensor cores (its vector_* and block_*)."""
    if block is not None and block[1] == 1 and op.endswith("_dgrad"):
        return False  # a vector is a column of the block there: nothing to multiply it with
    return _tall(block) and (dtype is not torch.float32 or allows_tf32(op))


def batch_major(op: str, x: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the backend chosen for these tensors writes batch-major or channels_last results.

    False, feature-major, where none serves them (device "meta").  Fake kernels ask this: what they
    promise, a compiled graph relies on.
    """
    try:
        module = choose(op, x, values)
    except BackendError:
        return False
    writes = getattr(module, "writes_batch_major", None)  # others write feature-major
    return writes is not None and bool(writes((int(values.shape[1]), int(values.shape[2]))))


def operand_layout(op: str, x: torch.Tensor, values: torch.Tensor) -> str | None:
    """What the kernels of the backend chosen for ``op`` read without a copy.

    "feature-major", "batch-major" (of images channels_last), or None where it is neither or nobody
    serves these tensors.
    """
    try:
        module = choose(op, x, values)
    except BackendError:
        return None
    if module is cpu:  # 16-bit activations are copied to float32 in any case
        return "feature-major" if x.dtype is values.dtype is torch.float32 else None
    if module is cuda or module is triton:
        return "batch-major" if batch_major(op, x, values) else "feature-major"
    return None


def _choose(
    op: str,
    forced: list[str],
    x: torch.Tensor,
    values: torch.Tensor | None,
    block: Block | None,
) -> ModuleType:
    why = reasons(op, x, values, block)
    for name in forced or BACKENDS:
        if why[name] is None:
            return BACKENDS[name]
    listed = "; ".join(f"{name}: {text}" for name, text in why.items() if text)
    raise BackendError(
        f"no backend computes sparse_kernels::{op} for {x.dtype} on device {x.device} "
        f"({listed}). Move the model to a supported device and dtype (float32 on the CPU), "
        "see `sparse-kernels info`, or force the slow oracle with SPARSE_KERNELS_BACKEND=reference"
    )
