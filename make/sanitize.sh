#!/usr/bin/env bash
# Builds the CPU kernels with sanitizers into build/<kind>/site and runs the tests that reach them.
#   PYTHON=... bash make/sanitize.sh address         AddressSanitizer and UBSan, every instruction set of this CPU
#   PYTHON=... bash make/sanitize.sh address quick   parity and refusals only
#   PYTHON=... bash make/sanitize.sh thread          ThreadSanitizer; OpenMP by tests/tsan_openmp.cpp
# Needs g++, pytest, and the build tools in the environment of PYTHON (`make dev-tools`).
set -euo pipefail
kind=${1:-address} part=${2:-all} python=${PYTHON:-python3}
build=build/san-$kind site=$PWD/build/san-$kind/site
case $kind in
  address) flags=address,undefined ;;
  thread) flags=thread ;;
  *) echo "expected address or thread, got $kind"; exit 2 ;;
esac

program() { "$python" -c "import $1, os; print(os.path.join($1.$2, '$1'))"; }
"$python" -m cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
  -DCMAKE_MAKE_PROGRAM="$(program ninja BIN_DIR)" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
  -DSPARSE_KERNELS_CUDA=OFF -DSPARSE_KERNELS_SANITIZE=$flags >"$build.log" 2>&1 || { cat "$build.log"; exit 1; }
"$python" -m cmake --build "$build" >>"$build.log" 2>&1 || { tail -n 40 "$build.log"; exit 1; }
rm -rf "$site" && mkdir -p "$site"
cp -r sparse_kernels "$site/"
rm -f "$site"/sparse_kernels/_native*.so
cp "$build"/_native*.so "$site/sparse_kernels/"

lib() { "${CXX:-c++}" -print-file-name="$1"; }
quick="tests/test_parity.py tests/test_native_refusals.py"
sparse="tests/test_native_sparse.py tests/test_linear_shares.py tests/test_wgrad_dense.py tests/test_scratch.py"
dense="tests/test_native_dense.py tests/test_native_norm_pool.py tests/test_native_pooling.py tests/test_dropout.py"
tests=$quick
[[ $part == quick ]] || tests="$quick $sparse $dense tests/test_prepared.py tests/test_layout.py tests/test_threads_forks.py"
# libstdc++ beside the runtime: it must find the real __cxa_throw, which torch brings only later. Python itself leaks.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$site OMP_NUM_THREADS=1 SPARSE_KERNELS_SANITIZED=$kind
if [[ $kind == address ]]; then
  export LD_PRELOAD="$(lib libasan.so) $(lib libubsan.so) $(lib libstdc++.so)"
else
  # torch, its BLAS and its libgomp are not instrumented: what only they do is not looked at.
  printf 'called_from_lib:lib%s\n' torch_cpu.so torch_python.so gomp >"$build/suppressions"
  export LD_PRELOAD="$(lib libtsan.so) $(lib libstdc++.so)"
  export TSAN_OPTIONS="suppressions=$PWD/$build/suppressions ignore_noninstrumented_modules=1 halt_on_error=1"
fi
# shellcheck disable=SC2086 # a list
exec "$python" -c "import sys; sys.path[:] = [p for p in sys.path if p]; import pytest; sys.exit(pytest.main(sys.argv[1:]))" \
  -p no:cacheprovider -q -m "not slow and not gpu" $tests # -m pytest would put the source tree first (-P: not in 3.10)
