#!/usr/bin/env bash
# Second half of `make test-full`: the test suite once more on every instruction set that this CPU can run, with the
# AVX-512 tile shapes emulated out of AVX2, and the baseline under qemu where qemu-user is installed. Left out is what
# runs no CPU kernel and takes long: the emulated CUDA kernels and the compilations of the Triton kernels.
# Called from the repository's root with VENV set; needs the build tools in it (`make dev-tools`).
set -euo pipefail

python=$VENV/bin/python
site=$PWD/build/emulated/site
qemu_cases=60 # each takes many times as long there

echo "=== building with the emulated AVX-512 variant into build/emulated/site"
rm -rf "$site" build/lib* build/bdist*
SPARSE_KERNELS_EMULATE_AVX512=ON SPARSE_KERNELS_CUDA=OFF "$python" -m pip install --quiet --no-index \
  --no-build-isolation --no-deps --target "$site" .
rm -rf build/lib* build/bdist*

export PYTHONPATH=$site OMP_NUM_THREADS=1
cd "$site" # not the source tree: `python -c` puts the working directory on sys.path
isas=$("$OLDPWD/$python" -c 'from sparse_kernels._load import native; print(*native().supported_isas())')
cd "$OLDPWD"
echo "=== instruction sets that this CPU can run: $isas"
for isa in $isas; do
  echo "=== SPARSE_KERNELS_ISA=$isa"
  SPARSE_KERNELS_ISA=$isa "$VENV/bin/pytest" -p no:cacheprovider -q -n 2 -m "not gpu" \
    --deselect tests/test_architecture.py --ignore tests/cuda_emulation --ignore tests/triton_kernels tests
done

# A CPU without AVX: an instruction of a wider set in a shared function would be an illegal instruction there.
if command -v qemu-x86_64 >/dev/null; then
  echo "=== baseline under qemu, CPU model Nehalem (no AVX)"
  qemu-x86_64 -cpu Nehalem "$python" -c "
import sys
sys.path[:] = [path for path in sys.path if path]
from sparse_kernels._load import native
print('supported:', native().supported_isas(), 'in use:', native().isa())
assert native().isa() == 'baseline'
sys.path.append('tests')
import torch
from parity import worst
table = worst($qemu_cases, 0, torch.float32)  # forward and backward, torch's own kernels included
print(table)
assert all(error <= 1e-5 for error, _ in table.values()), table"
else
  echo "=== qemu-x86_64 is not installed: the baseline was not run on a CPU without AVX"
fi
