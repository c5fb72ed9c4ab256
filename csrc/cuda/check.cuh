// Status checks and the device guard that every launcher uses.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace sk::cuda {

// `what` names the kernel and its shape; it is only rendered when the status is an error.
template <typename Describe>
inline void Check(cudaError_t status, const char* call, Describe what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(what() + ": " + call + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

// Makes `device` current for its lifetime.
class DeviceGuard {
 public:
  template <typename Describe>
  DeviceGuard(int device, Describe what) {
    Check(cudaGetDevice(&before_), "cudaGetDevice", what);
    if (before_ == device) return;
    Check(cudaSetDevice(device), "cudaSetDevice", what);
    switched_ = true;
  }
  ~DeviceGuard() {
    // A destructor cannot report; a device that was current a moment ago can be made current again.
    if (switched_) (void)cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool switched_ = false;
};

}  // namespace sk::cuda
