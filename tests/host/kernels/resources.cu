// Kernels with known use of registers and memory. Tests: tests/compile
#include <exl/ptx.cuh>

EXL_KERNEL(plain, 32, 1)(float* y) { y[threadIdx.x] = 1.0f; }

// 64 values per thread live across a loop, but 1,024 threads per block leave at most 64 registers: it must spill.
EXL_KERNEL(spilling, 1024, 1)(float* y, int n) {
  float v[64];
  EXL_UNROLL
  for (int i = 0; i < 64; ++i) v[i] = y[i * 1024 + threadIdx.x];
  for (int k = 0; k < n; ++k) {
    EXL_UNROLL
    for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i + 1) % 64] + v[(i + 7) % 64];
  }
  EXL_UNROLL
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = v[i];
}

#if !defined(EXL_HOST)
EXL_KERNEL(with_static_shared, 256, 1)(float* y) {
  __shared__ float buffer[256];
  buffer[threadIdx.x] = y[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = buffer[threadIdx.x ^ 128];
}
#endif

// A loop with two mma, after a loop without any.
EXL_KERNEL(mma_loop, 32, 1)(const u32* x, float* y, int n) {
  FragC d{};
  u32 sum = 0;
#pragma unroll 1
  for (int k = 0; k < n; ++k) sum ^= x[k * 64 + threadIdx.x];
#pragma unroll 1
  for (int k = 0; k < n; ++k) {
    const u32 v = x[k * 32 + threadIdx.x];
    const FragA a{{v, v ^ 1, v ^ 2, v ^ 3}};
    mma_m16n8k16(d, a, FragB{{v, sum}});
    mma_m16n8k16(d, a, FragB{{sum, v}});
  }
  for (int e = 0; e < 4; ++e) y[threadIdx.x * 4 + e] = d.r[e];
}
