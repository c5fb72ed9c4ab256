"""A launch of a Triton kernel compiled for a chip that is not there, and its machine code read."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA)\b")


def source_of(launch: Any) -> Any:
    """What Triton compiles for a launch, specialised as its launcher does."""
    from triton.compiler import ASTSource

    names = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = names[value.dtype]
            aligned = value.storage_offset() * value.itemsize % 16 == 0
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
            aligned = False
        elif parameter.is_constexpr or value == 1:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            aligned = False
        else:
            signature[parameter.name] = "i32"
            aligned = value % 16 == 0
        if aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constants, attributes)


def processor_seconds() -> float:
    """Processor time of this process and of the tools it ran; a busy machine does not change it."""
    return sum(os.times()[:4])


def compile_launch(launch: Any, arch: int) -> dict[str, Any]:
    """Compile a launch for a chip; what its machine code uses."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    target = GPUTarget("cuda", arch, 32)
    kernel = triton.compile(source_of(launch), target=target, options=options)
    # Memory that Triton would allocate beside torch's allocator: a captured graph must have none.
    scratch = kernel.metadata.global_scratch_size + kernel.metadata.profile_scratch_size
    shared = int(kernel.metadata.shared)
    return {**read_cubin(kernel.asm["cubin"]), "shared": shared, "scratch": scratch}


def read_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers, local memory, and the counts of the instructions that matter."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tool, "-res-usage", file.name)
        sass = _output(tool, "-sass", file.name)
    # "Function properties": one kernel per cubin.
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if used is None:
        raise RuntimeError(f"cuobjdump -res-usage: expected REG:... LOCAL:..., got {usage!r}")
    opcodes = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", sass, re.M))
    return {
        "registers": int(used[1]),
        "local": int(used[4]),
        "spills": opcodes["LDL"] + opcodes["STL"],
        "tensor": {name: n for name, n in opcodes.items() if TENSOR_CORE.fullmatch(name)},
        "ffma": opcodes["FFMA"] + opcodes["FFMA2"],
        # 16-bit factors, float32 sum: a bfloat16 product needs no conversion on sm_100.
        "mixed": opcodes["FHFMA"],
        "apart": opcodes["FMUL2"],  # pairs of products whose sums are formed after them
        "async": opcodes["LDGSTS"],
        "instructions": sum(opcodes.values()),
    }


def _output(tool: Path, *arguments: str) -> str:
    done = subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout
