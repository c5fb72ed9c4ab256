// Fragment layouts of mma.sync.m16n8k8 in TF32, as data: those of CuTe, package
// nvidia-cutlass 4.2.0, include/cute/atom/mma_traits_sm80.hpp,
// MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN> (C is its SM80_16x8_Row). A layout maps a lane and a
// value of it to a place: the sum of coordinate times stride, the first mode fastest. Places count
// m + 16 k of A, n + 8 k of B and m + 16 n of C. test_mma_fragments.py compares these numbers with
// the package's headers.
#pragma once

namespace emulation {

struct FragmentMode {
  int shape[2], stride[2];
  constexpr int Place(int index) const {
    return index % shape[0] * stride[0] + index / shape[0] % shape[1] * stride[1];
  }
};
struct FragmentLayout {
  FragmentMode lane, value;
  constexpr int Place(int lane_index, int value_index) const {
    return lane.Place(lane_index) + value.Place(value_index);
  }
};

constexpr FragmentLayout kTf32A = {{{4, 8}, {16, 1}}, {{2, 2}, {8, 64}}};
constexpr FragmentLayout kTf32B = {{{4, 8}, {8, 1}}, {{2, 1}, {32, 0}}};
constexpr FragmentLayout kTf32C = {{{4, 8}, {32, 1}}, {{2, 2}, {16, 8}}};

}  // namespace emulation
