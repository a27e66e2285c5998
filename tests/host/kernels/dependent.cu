// Kernels of a dependent chain, some correct, some faulty: tests/compile/test_dependence.py finds each fault in their PTX
// and machine code. Parameters are named as exl's own: w is a constant, x, ids and y are written by launches.
#include <exl/ptx.cuh>

EXL_KERNEL(all_right, 128, 1)
(const float* __restrict__ w, const float* x, const i32* ids, float* y, i64 stride, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float early = i < n ? w[i * stride] : 0.0f;
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  if (i >= n) return;
  float sum = 0.0f;
  for (int k = 0; k < ids[i]; ++k) sum += x[k] / w[k];   // a division: its slow path is a call
  y[i] = early * sum;
}

// The compiler may move reads of x above the wait.
EXL_KERNEL(restricted, 128, 1)(const float* __restrict__ w, const float* __restrict__ x, const i32* ids, float* y, i64 stride, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  if (i < n) y[i] = w[i * stride] * x[ids[i]];
}

EXL_KERNEL(read_as_constant, 128, 1)(const u32* __restrict__ w, const u32* x, const i32* ids, u32* y, i64 stride, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  griddepcontrol_wait();
  if (i < n) y[i] = w[i * stride] + ld_global_nc_u32(x + ids[i]);
}

// An address in one of two buffers; below, an address that is kept in shared memory.
EXL_KERNEL(either_as_constant, 128, 1)(const u32* __restrict__ w, const u32* x, const i32* ids, u32* y, i64 stride, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  griddepcontrol_wait();
  if (i < n) y[i] = ld_global_nc_u32((ids[i] > 0 ? w : x) + i * stride);
}
EXL_KERNEL(kept_address, 128, 1)(const u32* __restrict__ w, const u32* x, const i32* ids, u32* y, i64 stride, int n) {
  EXL_DYNAMIC_SMEM(const u32*, kept);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  kept[threadIdx.x] = x + i * stride;
  __syncthreads();
  const u32 early = *kept[127 - threadIdx.x];
  griddepcontrol_wait();
  if (i < n) y[i] = early + w[ids[i]];
}

EXL_KERNEL(read_early, 128, 1)(const float* __restrict__ w, const float* x, const i32* ids, float* y, i64 stride, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float early = i < n ? x[i * stride] : 0.0f;
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  if (i < n) y[i] = early * w[ids[i]];
}

EXL_KERNEL(copied_early, 128, 1)(const u32* __restrict__ w, const u32* x, const i32* ids, u32* y, i64 stride, int n) {
  EXL_DYNAMIC_SMEM(u32, copy);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  cp_async_4(copy + threadIdx.x, x + i * stride);
  cp_async_commit_group();
  griddepcontrol_wait();
  cp_async_wait_group<0>();
  if (i < n) y[i] = copy[threadIdx.x] + w[ids[i]];
}

EXL_KERNEL(wait_on_one_way, 128, 1)(const float* __restrict__ w, const float* x, const i32* ids, float* y, i64 stride, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (n > 7) griddepcontrol_wait();
  if (i < n) y[i] = w[i * stride] * x[i];
}

EXL_KERNEL(written_early, 128, 1)(const float* __restrict__ w, const float* x, const i32* ids, float* y, i64 stride, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = 0.0f;
  griddepcontrol_wait();
  if (i < n) y[i] += w[i * stride] * x[ids[i]];
}

EXL_KERNEL(ended_early, 128, 1)(const float* __restrict__ w, const float* x, const i32* ids, float* y, i64 stride, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  griddepcontrol_wait();
  y[i] = w[i * stride] * x[ids[i]];
}
