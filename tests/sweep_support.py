"""Lines of a sweep that nothing was trained for."""

from __future__ import annotations

MACHINE = {"cpu": "x", "isa": "y", "threads": 1, "torch": "2", "date": "2026-11-21",
           "sparse_kernels": "0", "commit": "c"}  # fmt: skip


def row(method: str, seed: int, accuracy: float, density: float = 0.05, variant: str = "") -> dict:
    return {
        "name": f"lenet-{method}-{density}-{seed}-{variant}", "variant": variant,
        "net": "lenet-300-100", "method": method, "density_asked": density, "seed": seed,
        "options": [], "test_accuracy": accuracy, "seconds": 2.0 + seed, "mean_step_seconds": 0.1,
        "steps": 10, "density": density, "flops_density": density, "machine": MACHINE,
        "command": "sparse-kernels train '<&>' --out nowhere --name none",
    }  # fmt: skip
