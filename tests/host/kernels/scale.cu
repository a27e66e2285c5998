#include <exl/half.cuh>
EXL_KERNEL(scale, 128, 1)(const half* __restrict__ x, float* __restrict__ y, int n, float s) {
  EXL_DYNAMIC_SMEM(float, buf);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  buf[threadIdx.x] = i < n ? __half2float(x[i]) * s : 0.f;
  __syncthreads();
  float v = buf[threadIdx.x ^ 1];
  v += __shfl_xor_sync(~0u, v, 1);
  if (i < n) y[i] = v;
}
