// For checks that need a GPU: streams, graphs, shared memory above 48 KB, dependent launches. The host shim runs them too.
// Tests: tests/kernels/test_gpu_launch.py
#include <exl/half.cuh>

// y = scale * x: x f16 [n], y f32 [n].
EXL_KERNEL(scale_halves, 128, 1)(const half* __restrict__ x, float* __restrict__ y, int n, float scale) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = __half2float(x[i]) * scale;
}

// y[i] += w[i % 128]: y f32 [n]. The weights are read while the previous launch may still run.
EXL_KERNEL(add_weights, 128, 1)(const float* __restrict__ w, float* __restrict__ y, int n) {
  const float weight = w[threadIdx.x];
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] += weight;
}

// y = x reversed within blocks of `count` floats, which are in shared memory all at once.
EXL_KERNEL(reverse_large, 128, 1)(const float* __restrict__ x, float* __restrict__ y, int count) {
  EXL_DYNAMIC_SMEM(float, buffer);
  const size_t start = static_cast<size_t>(blockIdx.x) * static_cast<size_t>(count);
  for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) buffer[i] = x[start + i];
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) y[start + i] = buffer[count - 1 - i];
}

// Writes one float at an index whose byte offset exceeds 32 bits.
EXL_KERNEL(far_store, 32, 1)(float* slab, i64 index) {
  if (threadIdx.x == 0) slab[index] += 1.0f;
}

// The same with a 32-bit index, which is the fault.
EXL_KERNEL(far_store_wrapped, 32, 1)(float* slab, int page, int page_floats) {
  if (threadIdx.x == 0) slab[static_cast<u32>(page) * static_cast<u32>(page_floats)] += 1.0f;
}
