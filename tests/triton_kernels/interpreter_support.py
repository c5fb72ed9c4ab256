"""What the tests correct in Triton's interpreter; the kernels themselves know nothing of it."""

from __future__ import annotations

import os
from typing import Any

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
HOW = (
    "the interpreter is chosen before triton is imported: "
    "TRITON_INTERPRET=1 pytest tests/triton_kernels (on a GPU these tests run compiled)"
)


def correct_interpreter() -> None:
    """Make the interpreters of Triton 3.6 to 3.9 compute what these kernels mean, and faster."""
    from triton.runtime import interpreter

    _take_range_bounds(interpreter)
    _multiply_bfloat16(interpreter)
    _keep_booleans(interpreter)
    _patch_the_language_once(interpreter)
    # Every integer operation is repeated in 64 bits to see an overflow; the offsets of these small
    # cases have none, and the check is half of the running time.
    interpreter.interpreter_builder.options.__dict__["sanitize_overflow"] = False


def _take_range_bounds(interpreter: Any) -> None:
    """Triton 3.6 turns a bound of range() into an integer by int() of an array of one element,
    which NumPy 2.4 refuses. Kernels keep `for`: the compiler pipelines no `while`.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _patch_the_language_once(interpreter: Any) -> None:
    """The interpreter replaces the language's functions at a launch, and again at every call of a
    function from a kernel, where they are replaced already: half of the running time.
    """
    import triton.language as tl

    patch = interpreter._patch_lang
    languages: dict[Any, tuple[Any, ...]] = {}

    def patched(function: Any) -> Any:
        if function not in languages:
            seen = function.__globals__.values()
            languages[function] = tuple(
                lang for lang in (tl, tl.core) if any(lang is g for g in seen)
            )
        if any(tl.core.is_builtin(lang.load) for lang in languages[function]):
            return patch(function)
        return interpreter._LangPatchScope()  # nothing to undo

    interpreter._patch_lang = patched


def _keep_booleans(interpreter: Any) -> None:
    """A scalar condition spread over a tile becomes int32 there, which no load takes as a mask."""
    import numpy

    builder = type(interpreter.interpreter_builder)
    handle = interpreter.TensorHandle
    spread = builder.create_splat

    def create_splat(self: Any, ret_ty: Any, arg: Any) -> Any:
        if arg.data.dtype != numpy.bool_:
            return spread(self, ret_ty, arg)
        data = numpy.full(ret_ty.shape, arg.data.reshape(-1)[0], dtype=numpy.bool_)
        return handle(data, arg.dtype.scalar)

    builder.create_splat = create_splat


def _multiply_bfloat16(interpreter: Any) -> None:
    """The interpreter keeps bfloat16 as bit patterns and multiplies these as integers."""
    import numpy
    import triton.language as tl

    builder = type(interpreter.interpreter_builder)
    handle = interpreter.TensorHandle
    multiply = builder.create_dot

    def widen(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        bits = operand.data.astype(numpy.uint32) << numpy.uint32(16)
        return handle(bits.view(numpy.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widen(a), widen(b), *rest)

    builder.create_dot = create_dot
