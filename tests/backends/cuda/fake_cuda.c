/* A libcuda.so.1 without a GPU for test_cuda_driver.py: it hands out numbered handles, remembers the
 * last launch whole, and of every launch the kernel and the attributes. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  unsigned grid[3], block[3], shared;
  void* stream;
  const int* attributes; /* id, padding, value */
  unsigned count;
} Config;

struct {
  unsigned grid[3], block[3], shared, count;
  int attribute, value, launches;
  uint64_t stream, function, context;
  unsigned char params[64];
  char name[64], image[64];
} last;
struct {
  uint64_t stream;
  int kernel; /* its place in names */
  unsigned count;
  int attribute, value; /* of the first attribute, 0 without any */
} launched[64];
struct {
  uint64_t address, dims[2], stride;
  unsigned rank, box[2], steps[2];
  int type, interleave, swizzle, promotion, fill, aligned, calls;
} map;              /* the last tensor map that was encoded */
char names[64][64]; /* of kernels in the order in which they were asked for */
int known;
int loads, raises, allowed, launch_code, map_code, refuse_loads, refuse_code, parameter_size,
    ptx_version;
int version; /* of the newest CUDA that this driver knows */
static const uintptr_t kHandles = 0x300000000000;
static __thread uintptr_t stack[8];
static __thread int depth; /* contexts of this thread; handle = 0x1000 + device */

void clear(void) {
  memset(&last, 0, sizeof last);
  memset(launched, 0, sizeof launched);
  memset(names, 0, sizeof names);
  memset(&map, 0, sizeof map);
  known = 0;
  loads = raises = allowed = launch_code = map_code = refuse_loads = refuse_code = parameter_size =
      0,
  ptx_version = 90, version = 13000;
  depth = 0;
}
int cuDriverGetVersion(int* out) { return *out = version, 0; }
int cuCtxGetCurrent(uintptr_t* out) { return *out = depth ? stack[depth - 1] : 0, 0; }
int cuCtxSetCurrent(uintptr_t context) {
  if (!depth) depth = 1;
  return stack[depth - 1] = context, 0;
}
int cuCtxPushCurrent_v2(uintptr_t context) { return stack[depth++] = context, 0; }
int cuCtxPopCurrent_v2(uintptr_t* out) { return *out = stack[--depth], 0; }
int cuCtxGetDevice(int* out) { return depth ? (*out = (int)(stack[depth - 1] - 0x1000), 0) : 201; }
int cuDeviceGet(int* out, int ordinal) { return ordinal < 4 ? (*out = ordinal, 0) : 101; }
int cuDevicePrimaryCtxRetain(uintptr_t* out, int device) {
  return *out = 0x1000 + (uintptr_t)device, 0;
}
int cuModuleLoadData(uintptr_t* out, const char* image) {
  if (loads++ < refuse_loads) return refuse_code;
  strncpy(last.image, image, sizeof last.image - 1);
  return *out = 0x2000 + (uintptr_t)loads, 0;
}
int cuModuleGetFunction(uintptr_t* out, uintptr_t module, const char* name) {
  if (!strncmp(name, "absent", 6)) return 500;
  if (!module || known == 64) return 500;
  strncpy(last.name, name, sizeof last.name - 1);
  strncpy(names[known], name, sizeof names[known] - 1);
  /* more than 32 bits: a handle cut to an int is noticed */
  return *out = kHandles + (uintptr_t)known++, 0;
}
int cuFuncGetAttribute(int* out, int attribute, uintptr_t function) {
  return *out = attribute == 1 ? 1024 : attribute == 5 ? ptx_version : -1, function == 0;
}
int cuFuncSetAttribute(uintptr_t function, int attribute, int value) {
  return raises++, allowed = attribute == 8 ? value : -1, function == 0;
}
int cuFuncGetParamInfo(uintptr_t function, size_t index, size_t* offset, size_t* size) {
  return *offset = 0, *size = (size_t)parameter_size, parameter_size == 0 || index || !function;
}
int cuGetErrorName(int code, const char** out) {
  return *out = code == 701 ? "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES" : "CUDA_ERROR_OTHER", 0;
}
int cuGetErrorString(int code, const char** out) {
  return *out = code == 701 ? "too many resources requested" : "something else", 0;
}
int cuTensorMapEncodeTiled(unsigned char* out, int type, unsigned rank, void* address,
                           const uint64_t* dims, const uint64_t* strides, const unsigned* box,
                           const unsigned* steps, int interleave, int swizzle, int promotion,
                           int fill) {
  map.calls++;
  if (map_code) return map_code;
  map.type = type, map.rank = rank, map.address = (uint64_t)address, map.stride = strides[0];
  for (int i = 0; i < 2; ++i) map.dims[i] = dims[i], map.box[i] = box[i], map.steps[i] = steps[i];
  map.interleave = interleave, map.swizzle = swizzle, map.promotion = promotion, map.fill = fill;
  map.aligned = (uintptr_t)out % 64 == 0;
  for (int i = 0; i < 128; ++i) out[i] = (unsigned char)(i + map.calls);
  return 0;
}
int cuLaunchKernelEx(const Config* config, uintptr_t function, void** params, void** extra) {
  if (extra) return 1;
  if (launch_code) return launch_code;
  memcpy(last.grid, config->grid, sizeof last.grid);
  memcpy(last.block, config->block, sizeof last.block);
  last.shared = config->shared;
  last.stream = (uint64_t)config->stream;
  last.count = config->count;
  last.attribute = config->count ? config->attributes[0] : 0;
  last.value = config->count ? config->attributes[2] : 0;
  last.function = function;
  if (last.launches < 64) {
    launched[last.launches].stream = last.stream;
    launched[last.launches].kernel = (int)(function - kHandles);
    launched[last.launches].count = last.count;
    launched[last.launches].attribute = last.attribute;
    launched[last.launches].value = last.value;
  }
  last.context = depth ? stack[depth - 1] : 0;
  memcpy(last.params, params[0],
         parameter_size && parameter_size < 64 ? (size_t)parameter_size : 16);
  return ++last.launches, 0;
}
