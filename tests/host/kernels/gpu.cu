// What only a GPU shows: streams, graphs, shared memory above 48 KB, launches in a chain. The host shim runs them too.
// Tests: tests/kernels/test_gpu_launch.py
#include <exl/half.cuh>

// y = scale * x: x f16 [n], y f32 [n].
EXL_KERNEL(scale_halves, 128, 1)(const half* __restrict__ x, float* __restrict__ y, int n, float scale) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] = __half2float(x[i]) * scale;
}

// y[i] += w[i % 128]: y f32 [n]. Weights are read before the launch before has ended.
EXL_KERNEL(add_weights, 128, 1)(const float* __restrict__ w, float* __restrict__ y, int n) {
  const float weight = w[threadIdx.x];
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < n) y[i] += weight;
}

// y = x reversed within blocks of `count` floats, all of them in shared memory at once.
EXL_KERNEL(reverse_large, 128, 1)(const float* __restrict__ x, float* __restrict__ y, int count) {
  EXL_DYNAMIC_SMEM(float, buffer);
  const size_t start = static_cast<size_t>(blockIdx.x) * static_cast<size_t>(count);
  for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) buffer[i] = x[start + i];
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += static_cast<int>(blockDim.x)) y[start + i] = buffer[count - 1 - i];
}

// One float, at an index beyond what 32 bits of bytes reach.
EXL_KERNEL(far_store, 32, 1)(float* slab, i64 index) {
  if (threadIdx.x == 0) slab[index] += 1.0f;
}

// The index computed in 32 bits, as it must not be.
EXL_KERNEL(far_store_wrapped, 32, 1)(float* slab, int page, int page_floats) {
  if (threadIdx.x == 0) slab[static_cast<u32>(page) * static_cast<u32>(page_floats)] += 1.0f;
}
