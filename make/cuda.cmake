# Decides whether CUDA is compiled.  Sets SK_CUDA (bool), SK_CUDA_WHY (why not, when not),
# SK_CUDA_VERSION, SK_CUDA_ARCHITECTURES.  Must run before the first target is created.
set(SK_CUDA 0)
set(SK_CUDA_WHY "")
set(SK_CUDA_VERSION "")
set(SK_CUDA_ARCHITECTURES "")

string(TOUPPER "${SPARSE_KERNELS_CUDA}" SPARSE_KERNELS_CUDA)
if(NOT SPARSE_KERNELS_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR
    "SPARSE_KERNELS_CUDA=${SPARSE_KERNELS_CUDA} is not understood: set it to AUTO, ON or OFF")
endif()
if(SPARSE_KERNELS_CUDA STREQUAL "OFF")
  set(SK_CUDA_WHY "switched off by SPARSE_KERNELS_CUDA=OFF")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  set(SK_CUDA_WHY "no working nvcc was found (PATH, CUDACXX) when the package was built")
  if(SPARSE_KERNELS_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "SPARSE_KERNELS_CUDA=ON, but no working nvcc was found. Install the CUDA toolkit 12 or 13 and "
      "put its bin directory on PATH, or set CUDACXX=/path/to/nvcc; or set SPARSE_KERNELS_CUDA=OFF "
      "(or AUTO) to build the package for the CPU only")
  endif()
  return()
endif()

# sm_100 needs nvcc 12.8; the compiler itself says what it knows.
execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-arch
                OUTPUT_VARIABLE known_architectures ERROR_QUIET)
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 80-virtual 90a-real)
  if(known_architectures MATCHES "compute_100")
    list(APPEND CMAKE_CUDA_ARCHITECTURES 100-real)
  endif()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(SK_CUDA 1)
set(SK_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
list(JOIN CMAKE_CUDA_ARCHITECTURES "," SK_CUDA_ARCHITECTURES)
