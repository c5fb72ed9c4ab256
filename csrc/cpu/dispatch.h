// Which instruction set serves the kernels: chosen once at import, changeable by name.
#pragma once

#include <string>
#include <vector>

#include "kernels_dense.h"

namespace sk {

struct SparseKernels;  // kernels.h

// Launchers of the instruction set in use.
const DenseKernels& dense_kernels();
const SparseKernels& sparse_kernels();

// Name of the instruction set in use: "baseline", "avx2", "avx512" or "avx512-emulated".
std::string isa();

// Names of all that were compiled into this binary, and of those that this CPU and operating
// system can run, both from the lowest to the highest.
std::vector<std::string> built_isas();
std::vector<std::string> supported_isas();

// Uses `name` from now on. Throws std::invalid_argument for an unknown or unsupported name;
// `origin` says in the message where the name came from. Not to be called while a kernel runs.
void set_isa(const std::string& name, const std::string& origin);

// Uses what the environment variable SPARSE_KERNELS_ISA names, or the highest supported instruction
// set if it is unset or empty. Throws as set_isa does.
void choose_isa();

}  // namespace sk
