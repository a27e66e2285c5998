// Kernels for the roofs that benchmarks/machine.py measures. Two entries.
//
// read_all: reads uint4 src [n] once; writes out [1] only if the result is one fixed word, so that no read is optimised away.
// touch: one thread adds 1 to counter: the smallest kernel, for the gap between launches.
#include <exl/ptx.cuh>

EXL_KERNEL(read_all, 512, 2)(const uint4* __restrict__ src, u32* out, u64 n) {
  u32 seen = 0;
  const u64 stride = static_cast<u64>(gridDim.x) * 512;
  for (u64 i = static_cast<u64>(blockIdx.x) * 512 + threadIdx.x; i < n; i += 4 * stride) {
    uint4 v[4];
    EXL_UNROLL
    for (u32 j = 0; j < 4; ++j) v[j] = i + j * stride < n ? ld_global_nc_u32x4(src + i + j * stride) : make_uint4(0, 0, 0, 0);
    EXL_UNROLL
    for (u32 j = 0; j < 4; ++j) seen |= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
  }
  if (seen == 0x9e3779b9u) *out = seen;
}

EXL_KERNEL(touch, 32, 1)(u32* counter) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  if (threadIdx.x == 0) *counter += 1;
}
