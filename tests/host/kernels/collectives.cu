// Warp-wide instructions, one per launch, with the results of every lane. Test: tests/kernels/test_shim_instructions.py
#include <exl/half.cuh>

#ifndef EXL_KIND
#define EXL_KIND 0
#endif
constexpr int kKind = EXL_KIND;

// in u32 [32][10]: a[4], b[2], c[4]; out f32 [32][4]. Kinds: 0 m16n8k16 f16, 1 m16n8k16 bf16, 2 m16n8k8 f16.
EXL_KERNEL(mma, 32, 1)(const u32* in, float* out) {
  const u32* p = in + threadIdx.x * 10;
  const FragA a{{p[0], p[1], p[2], p[3]}};
  const FragB b{{p[4], p[5]}};
  FragC d{{__uint_as_float(p[6]), __uint_as_float(p[7]), __uint_as_float(p[8]), __uint_as_float(p[9])}};
  if (kKind == 0) mma_m16n8k16(d, a, b);
  if (kKind == 1) mma_m16n8k16_bf16(d, a, b);
  if (kKind == 2) mma_m16n8k8(d, a.r[0], a.r[1], b.r[0]);
  for (int e = 0; e < 4; ++e) out[threadIdx.x * 4 + e] = d.r[e];
}

// in u16 [32][8]: four 8x8 matrices; out u32 [32][4]. Kinds: 1, 2, 4 matrices, plus 8: transposed; 16: movmatrix.
EXL_KERNEL(matrices, 32, 1)(const uint4* in, u32* out) {
  EXL_DYNAMIC_SMEM(uint4, buffer);
  const int lane = threadIdx.x;
  buffer[lane] = in[lane];
  __syncwarp();
  u32* r = out + lane * 4;
  const uint4* row = buffer + lane % (kKind % 8 ? 8 * (kKind % 8) : 8);
  if (kKind == 1) r[0] = ldmatrix_x1(row);
  if (kKind == 9) r[0] = ldmatrix_x1_trans(row);
  if (kKind == 2 || kKind == 10) {
    const uint2 v = kKind == 2 ? ldmatrix_x2(row) : ldmatrix_x2_trans(row);
    r[0] = v.x; r[1] = v.y;
  }
  if (kKind == 4 || kKind == 12) {
    const uint4 v = kKind == 4 ? ldmatrix_x4(row) : ldmatrix_x4_trans(row);
    r[0] = v.x; r[1] = v.y; r[2] = v.z; r[3] = v.w;
  }
  if (kKind == 16) r[0] = movmatrix_trans(ldmatrix_x1(row));
}

// in u32 [64]; out u32 [64][8]. Two warps; `width`, `operand` as given.
EXL_KERNEL(shuffles, 64, 1)(const u32* in, u32* out, int operand, int width) {
  const int i = threadIdx.x;
  const u32 v = in[i];
  u32* r = out + i * 8;
  r[0] = __shfl_sync(~0u, v, operand, width);
  r[1] = __shfl_up_sync(~0u, v, operand, width);
  r[2] = __shfl_down_sync(~0u, v, operand, width);
  r[3] = __shfl_xor_sync(~0u, v, operand, width);
  const u64 wide = (static_cast<u64>(v) << 32) | static_cast<u32>(i);
  r[4] = static_cast<u32>(__shfl_xor_sync(~0u, wide, 1) >> 32);
  r[5] = static_cast<u32>(__shfl_xor_sync(~0u, wide, 1));
  r[6] = __float_as_uint(__shfl_down_sync(~0u, __uint_as_float(v), 16));
  r[7] = 0;
  if (i % 32 < 8) r[7] = __shfl_xor_sync(0xffu, v, 4);   // only part of the warp
}

// in u32 [64]; out u32 [64][14]; sm_80 and up. The last warp is not full when the block has 48 threads.
EXL_KERNEL(votes, 64, 1)(const u32* in, u32* out) {
  const int i = threadIdx.x;
  const u32 v = in[i];
  u32* r = out + i * 14;
  int all = 0;
  r[0] = __ballot_sync(~0u, v & 1);
  r[1] = __any_sync(~0u, v == 3);
  r[2] = __all_sync(~0u, v < 8);
  r[3] = __match_any_sync(~0u, v);
  r[4] = __match_all_sync(~0u, i / 32, &all);
  r[5] = all;
#if EXL_ARCH >= 80
  r[6] = __reduce_add_sync(~0u, v);
  r[7] = __reduce_max_sync(~0u, static_cast<int>(v) - 4);
  r[8] = __reduce_min_sync(~0u, v);
  r[9] = __reduce_xor_sync(~0u, v);
#endif
  r[10] = __syncthreads_count(v & 1);
  r[11] = __syncthreads_or(v == 7);
  r[12] = __syncthreads_and(v < 8);
  r[13] = __activemask() >> (i % 32) & 1;   // only the caller's own bit is promised
}

// slots i32 [8] in shared memory; each of 64 threads does one operation per slot. out i32 [64][8]: old values per thread.
EXL_KERNEL(atomics, 64, 1)(const int* in, int* result, int* old) {
  EXL_DYNAMIC_SMEM(int, slots);
  const int i = threadIdx.x;
  if (i < 8) slots[i] = result[i];
  __syncthreads();
  int* r = old + i * 8;
  r[0] = atomicAdd(slots, in[i]);
  r[1] = atomicMin(slots + 1, in[i]);
  r[2] = atomicMax(slots + 2, in[i]);
  r[3] = atomicXor(slots + 3, in[i]);
  r[4] = static_cast<int>(atomicInc(reinterpret_cast<u32*>(slots) + 4, 40u));
  r[5] = atomicCAS(slots + 5, i, i + 1);
  r[6] = atomicExch(slots + 6, i);
  r[7] = atomicSub(slots + 7, in[i]);
  __syncthreads();
  if (i < 8) result[i] = slots[i];
}

// The last block to arrive adds the values of all blocks in index order: partials f32 [blocks].
EXL_KERNEL(last_block, 32, 1)(const float* x, float* partials, u32* counter, float* y) {
  EXL_DYNAMIC_SMEM(u32, ticket);
  const int lane = threadIdx.x;
  float v = x[blockIdx.x * 32 + lane];
  EXL_UNROLL
  for (int d = 16; d; d /= 2) v += __shfl_xor_sync(~0u, v, d);
  if (lane == 0) {
    partials[blockIdx.x] = v;
    __threadfence();
    *ticket = atomicAdd(counter, 1u);
  }
  __syncthreads();
  if (*ticket == gridDim.x - 1 && lane == 0) {
    __threadfence();
    float sum = 0.0f;
    for (u32 b = 0; b < gridDim.x; ++b) sum += partials[b];
    *y = sum;
    *counter = 0;
  }
}

// The order in which threads ran, by a counter: order i32 [blocks * threads].
EXL_KERNEL(schedule, 64, 1)(int* counter, int* order) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  order[atomicAdd(counter, 1)] = i;
}
