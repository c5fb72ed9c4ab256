// The runtime API: devices, statuses, and the checks of a launch.
#include <cstring>
#include <map>
#include <string>

#include "cuda_runtime_api.h"
#include "runtime.h"

namespace {

constexpr int kSharedDefault = 48 << 10;  // without asking for more
constexpr int kSharedOptIn = 227 << 10;   // sm_90, the largest per block

int current_device = 0;
cudaError_t last_error = cudaSuccess;
std::string text;
std::map<const void*, int> allowed_shared;

}  // namespace

namespace emulation {
int max_grid_y = 65535;
bool compiled = true;

cudaError_t Remember(cudaError_t status) {
  if (status != cudaSuccess) last_error = status;
  return status;
}
}  // namespace emulation

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kEmulatedDevices) return emulation::Remember(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device < 0 || device >= kEmulatedDevices) return emulation::Remember(cudaErrorInvalidDevice);
  *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : kSharedOptIn;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() {
  const cudaError_t status = last_error;
  last_error = cudaSuccess;
  return status;
}

const char* cudaGetErrorString(cudaError_t status) {
  if (status == cudaErrorLaunchFailure) {
    text = emulation::LastFault();
    return text.c_str();
  }
  if (status == cudaErrorNoKernelImageForDevice)
    return "no kernel image is available for execution on the device";
  return status == cudaErrorInvalidConfiguration ? "invalid configuration argument"
         : status == cudaErrorInvalidDevice      ? "invalid device ordinal"
         : status == cudaErrorInvalidValue       ? "invalid argument"
         : status == cudaErrorInvalidResourceHandle
             ? "invalid resource handle (a stream of another device, or none)"
         : status == cudaErrorStreamCaptureUnsupported
             ? "operation not permitted when stream is capturing"
         : status == cudaErrorStreamCaptureImplicit
             ? "operation would make the legacy stream depend on a capturing blocking stream"
             : "no error";
}

const char* cudaGetErrorName(cudaError_t status) {
  return status == cudaErrorLaunchFailure              ? "cudaErrorLaunchFailure"
         : status == cudaErrorInvalidConfiguration     ? "cudaErrorInvalidConfiguration"
         : status == cudaErrorInvalidDevice            ? "cudaErrorInvalidDevice"
         : status == cudaErrorInvalidValue             ? "cudaErrorInvalidValue"
         : status == cudaErrorInvalidResourceHandle    ? "cudaErrorInvalidResourceHandle"
         : status == cudaErrorStreamCaptureUnsupported ? "cudaErrorStreamCaptureUnsupported"
         : status == cudaErrorStreamCaptureImplicit    ? "cudaErrorStreamCaptureImplicit"
                                                       : "cudaSuccess";
}

namespace emulation {

cudaError_t AllowShared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > kSharedOptIn) return Remember(cudaErrorInvalidValue);
  allowed_shared[kernel] = bytes;
  return cudaSuccess;
}

size_t SharedRoom(const void* kernel) {
  return allowed_shared.count(kernel) != 0 ? kSharedOptIn : kSharedDefault;
}

// The limits of the programming guide, table "technical specifications per compute capability".
cudaError_t CheckLaunch(const void* kernel, const cudaLaunchConfig_t& c) {
  const dim3 &grid = c.gridDim, &block = c.blockDim;
  const auto asked = allowed_shared.find(kernel);
  const size_t shared =
      asked == allowed_shared.end() ? kSharedDefault : std::max(asked->second, kSharedDefault);
  const bool fine = grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= 0x7fffffffu &&
                    grid.y <= 65535 && grid.z <= 65535 && block.x >= 1 && block.y >= 1 &&
                    block.z >= 1 && block.x <= 1024 && block.y <= 1024 && block.z <= 64 &&
                    uint64_t(block.x) * block.y * block.z <= 1024;
  if (!fine) return Remember(cudaErrorInvalidConfiguration);
  return c.dynamicSmemBytes <= shared ? cudaSuccess : Remember(cudaErrorInvalidValue);
}

cudaError_t FinishLaunch(bool fine) {
  return fine ? cudaSuccess : Remember(cudaErrorLaunchFailure);
}

}  // namespace emulation
