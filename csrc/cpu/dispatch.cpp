#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

#include "build_config.h"
#include "kernels.h"

namespace sk {

// The tables live in the objects of their instruction set.
#define SK_DECLARE_TABLES(ISA)                 \
  namespace ISA {                              \
  const DenseKernels& dense_kernels_table();   \
  const SparseKernels& sparse_kernels_table(); \
  }

SK_DECLARE_TABLES(baseline)
#ifdef SK_X86
SK_DECLARE_TABLES(avx2)
SK_DECLARE_TABLES(avx512)
#ifdef SK_EMULATED512
SK_DECLARE_TABLES(emulated512)
#endif
#endif

namespace {

struct Isa {
  const char* name;
  bool (*usable)();  // by this CPU and operating system
  bool automatic;    // may be chosen without being named
  const DenseKernels& (*dense)();
  const SparseKernels& (*sparse)();
};

bool Always() { return true; }

#ifdef SK_X86
// __builtin_cpu_supports asks CPUID, and XGETBV whether the operating system saves the registers.
bool HasAvx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// From the lowest to the highest.
const Isa kIsas[] = {
    {"baseline", Always, true, baseline::dense_kernels_table, baseline::sparse_kernels_table},
#ifdef SK_X86
    {"avx2", HasAvx2, true, avx2::dense_kernels_table, avx2::sparse_kernels_table},
#ifdef SK_EMULATED512
    {"avx512-emulated", HasAvx2, false, emulated512::dense_kernels_table,
     emulated512::sparse_kernels_table},
#endif
    {"avx512", HasAvx512, true, avx512::dense_kernels_table, avx512::sparse_kernels_table},
#endif
};

const Isa* chosen = &kIsas[0];

std::string Joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

}  // namespace

const DenseKernels& dense_kernels() { return chosen->dense(); }

const SparseKernels& sparse_kernels() { return chosen->sparse(); }

std::string isa() { return chosen->name; }

std::vector<std::string> built_isas() {
  std::vector<std::string> names;
  for (const Isa& candidate : kIsas) names.push_back(candidate.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& candidate : kIsas) {
    if (candidate.usable()) names.push_back(candidate.name);
  }
  return names;
}

void set_isa(const std::string& name, const std::string& origin) {
  for (const Isa& candidate : kIsas) {
    if (name != candidate.name) continue;
    if (!candidate.usable()) {
      throw std::invalid_argument(
          origin + " asks for the instruction set '" + name +
          "', which this CPU or operating system does not support; use one of: " +
          Joined(supported_isas()));
    }
    chosen = &candidate;
    return;
  }
  throw std::invalid_argument(
      origin + " names the instruction set '" + name +
      "', which this build does not have; use one of: " + Joined(supported_isas()));
}

void choose_isa() {
  const char* forced = std::getenv("SPARSE_KERNELS_ISA");
  if (forced != nullptr && *forced != '\0') {
    set_isa(forced, "the environment variable SPARSE_KERNELS_ISA");
    return;
  }
  for (const Isa& candidate : kIsas) {
    if (candidate.automatic && candidate.usable()) chosen = &candidate;
  }
}

}  // namespace sk
