"""Kernels in forked workers, in two threads at once, and beside a second OpenMP runtime."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch

from sparse_kernels.nn import SparseConv2d, SparseLinear

SANITIZED = os.environ.get("SPARSE_KERNELS_SANITIZED")

#: "" is the working directory, the source tree; the package under test may be an installed one.
NOT_HERE = "import sys; sys.path[:] = [path for path in sys.path if path]\n"

#: ThreadSanitizer ends a process that starts threads after a fork of several threads.
forks = pytest.mark.skipif(SANITIZED == "thread", reason="ThreadSanitizer does not support forks")


def run(script: str, *arguments: str, seconds: int = 600) -> str:
    """The script's output, from a process of its own: what hangs is a failure, not a hung test."""
    command = [sys.executable, "-c", NOT_HERE + textwrap.dedent(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


FORKED = """
import os, sys, torch
from torch.utils.data import DataLoader, Dataset
from sparse_kernels.nn import SparseConv2d, SparseLinear

torch.manual_seed(0)
torch.set_num_threads(2)
layers = [SparseLinear(300, 200, density=0.2), SparseConv2d(16, 24, 3, density=0.3)]
inputs = [torch.randn(64, 300), torch.randn(32, 16, 12, 12)]

def work(i):
    x = inputs[i].clone().requires_grad_()
    y = layers[i](x)
    gradients = torch.autograd.grad(y.square().sum(), (x, layers[i].values))
    return torch.cat([t.detach().reshape(-1) for t in (y, *gradients)])

expected = [work(0), work(1)]   # both threads of the pool have run
"""


@forks
def test_dataloader_workers_that_fork_after_a_kernel_ran() -> None:
    run(
        FORKED
        + """
class Work(Dataset):
    def __len__(self): return 8
    def __getitem__(self, i): return i, work(i % 2)

loader = DataLoader(Work(), batch_size=None, num_workers=2, multiprocessing_context="fork")
found = list(loader)
assert len(found) == 8
assert all(torch.equal(expected[int(i) % 2], y) for i, y in found)
assert torch.equal(work(0), expected[0]) and torch.get_num_threads() == 2
"""
    )


@forks
def test_a_fork_after_a_kernel_ran_computes_on_one_thread() -> None:
    """libgomp's pool does not survive a fork: two threads there would wait for ever."""
    run(
        FORKED
        + """
child = os.fork()
if child == 0:
    right = torch.get_num_threads() == 1 and all(torch.equal(work(i), expected[i]) for i in (0, 1))
    os._exit(0 if right else 3)
assert os.waitpid(child, 0)[1] == 0
assert torch.get_num_threads() == 2 and torch.equal(work(1), expected[1])
"""
    )


@pytest.mark.parametrize("storage", ["compressed", "dense-masked"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_two_threads_in_one_layer(kind: str, storage: str) -> None:
    """Each thread's output and gradients are those of the layer alone, to the last bit."""
    if kind == "linear":
        layer = SparseLinear(60, 50, density=0.3).to_storage_(storage)
        inputs = [torch.randn(n, 60) for n in (8, 33, 64)]
    else:
        layer = SparseConv2d(6, 8, 3, padding=1, density=0.4).to_storage_(storage)
        inputs = [torch.randn(n, 6, s, s) for n, s in ((4, 7), (9, 5), (16, 6))]

    def work(x: torch.Tensor) -> list[torch.Tensor]:
        x = x.clone().requires_grad_()
        y = layer(x)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (x, layer.values, layer.bias))]

    expected = [work(x) for x in inputs]
    wrong: list[str] = []

    def repeat(first: int) -> None:
        try:
            for i in range(first, first + 60):
                at = i % len(inputs)
                if not all(map(torch.equal, work(inputs[at]), expected[at])):
                    wrong.append(f"round {i}")
        except Exception as problem:
            wrong.append(repr(problem))

    threads = [threading.Thread(target=repeat, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


SECOND = """
#include <omp.h>
double total(const double *x, long n, int *threads) {
  double sum = 0;
  #pragma omp parallel for num_threads(2) reduction(+ : sum)
  for (long i = 0; i < n; ++i) { sum += x[i]; *threads = omp_get_num_threads(); }
  return sum;
}
"""


@pytest.mark.skipif(SANITIZED is not None, reason="the second runtime needs RTLD_DEEPBIND")
def test_beside_a_second_openmp_runtime(tmp_path: Path) -> None:
    """As a wheel brings one: libgomp under another name, its symbols its own."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to make a library with a second OpenMP runtime")
    asked = [compiler, "-print-file-name=libgomp.so.1"]
    runtime = Path(subprocess.run(asked, capture_output=True, text=True).stdout.strip())
    if not runtime.is_absolute():
        pytest.skip("the compiler has no libgomp.so.1")
    other = tmp_path / "libgomX.so.1"
    other.write_bytes(runtime.read_bytes().replace(b"libgomp.so.1\0", b"libgomX.so.1\0"))
    source = tmp_path / "second.c"
    source.write_text(SECOND)
    library = tmp_path / "libsecond.so"
    objects = tmp_path / "second.o"
    subprocess.run([compiler, "-O1", "-fPIC", "-fopenmp", "-c", source, "-o", objects], check=True)
    link = [compiler, "-shared", objects, other, "-Wl,-rpath,$ORIGIN", "-o", library]
    subprocess.run(link, check=True)
    out = run(
        FORKED
        + """
import ctypes
second = ctypes.CDLL(sys.argv[1], mode=os.RTLD_LOCAL | os.RTLD_DEEPBIND)
second.total.restype = ctypes.c_double
numbers = (ctypes.c_double * 1000)(*range(1000))
for _ in range(5):
    threads = ctypes.c_int(0)
    assert second.total(numbers, 1000, ctypes.byref(threads)) == 499500 and threads.value == 2
    assert all(torch.equal(work(i), expected[i]) for i in (0, 1))
maps = open("/proc/self/maps").read()
print(len({line.split()[-1] for line in maps.splitlines() if "libgom" in line}))
""",
        str(library),
    )
    assert int(out) >= 2, "both runtimes must have been in the process"
