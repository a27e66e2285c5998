#pragma once
// Rows of activations, eight channels a thread: loads and stores of any type, sums over a block, and the sums of squares
// that a norm's prologue reads.
#include <exl/half.cuh>

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;   // of a block that has one row

// Eight channels from `at` on, in f32. Type 0, 1, 2: f16, bf16, f32; 16 (f32: 32) bytes, aligned to 16.
EXL_DEVICE void load_eight(float (&v)[8], const void* x, size_t at, int type) {
  if (type == 2) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(x) + at);
    const float4 a = from[0], b = from[1];
    v[0] = a.x; v[1] = a.y; v[2] = a.z; v[3] = a.w; v[4] = b.x; v[5] = b.y; v[6] = b.z; v[7] = b.w;
    return;
  }
  const uint4 bits = *reinterpret_cast<const uint4*>(static_cast<const u16*>(x) + at);
  const u32 pairs[4] = {bits.x, bits.y, bits.z, bits.w};
  EXL_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = type == 1 ? __uint_as_float(pairs[i] << 16) : __low2float(bits_half2(pairs[i]));
    v[2 * i + 1] = type == 1 ? __uint_as_float(pairs[i] & 0xffff0000u) : __high2float(bits_half2(pairs[i]));
  }
}

EXL_DEVICE void store_one(void* y, size_t at, float value, int type) {
  if (type == 0) static_cast<half*>(y)[at] = saturated_half(value);
  else if (type == 1) static_cast<bf16*>(y)[at] = __float2bfloat16_rn(value);
  else static_cast<float*>(y)[at] = value;
}

// Channels k to k + 7 of the row that begins at `row`, each rounded once; with a channel_map channel k is stored at
// channel_map[k].
EXL_DEVICE void store_eight(void* y, size_t row, int k, const float (&v)[8], int type, const i32* channel_map) {
  if (channel_map) {
    EXL_UNROLL
    for (int i = 0; i < 8; ++i) store_one(y, row + channel_map[k + i], v[i], type);
    return;
  }
  if (type == 2) {
    float4* out = reinterpret_cast<float4*>(static_cast<float*>(y) + row + k);
    out[0] = make_float4(v[0], v[1], v[2], v[3]);
    out[1] = make_float4(v[4], v[5], v[6], v[7]);
    return;
  }
  u32 pairs[4];
  EXL_UNROLL
  for (int i = 0; i < 4; ++i)
    pairs[i] = type == 1 ? cvt_bf16x2_f32(v[2 * i], v[2 * i + 1]) : saturated_half2(v[2 * i], v[2 * i + 1]);
  *reinterpret_cast<uint4*>(static_cast<u16*>(y) + row + k) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// Sum of eight, in the order of the shuffles over lanes in epilogue.cuh: element i is the square of channel i of a tile plus
// that of channel i + 8.
EXL_DEVICE float tree_sum(float (&x)[8]) {
  EXL_UNROLL
  for (int d = 1; d < 8; d *= 2) {
    EXL_UNROLL
    for (int i = 0; i < 8; i += 2 * d) x[i] += x[i + d];
  }
  return x[0];
}

// Sum over a block of kRowThreads threads, each of which calls this and gets it. s_sums [kRowWarps] is used by one call.
EXL_DEVICE float block_sum(float x, float* s_sums) {
  const int tid = static_cast<int>(threadIdx.x);
  EXL_UNROLL
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(0xffffffffu, x, d);
  if (tid % 32 == 0) s_sums[tid / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  EXL_UNROLL
  for (int w = 0; w < kRowWarps; ++w) sum += s_sums[w];
  return sum;
}

// How a row is normalised: (x - mean) * factor, where factor is 1 / sqrt(mean of squares of that + eps). kCentred: the
// mean is the row's, as LayerNorm has it; else 0, as RMSNorm has it.
struct RowNorm {
  float mean, factor;
};

// A block's row of K channels from `at` on; s_sums: f32 [2 * kRowWarps] of shared memory. The order of the sums depends on
// K alone. The row is read once, or twice, and once more by the caller, from the first-level cache.
template <bool kCentred> EXL_DEVICE RowNorm norm_of_row(const void* x, size_t at, int type, int K, float eps, float* s_sums) {
  const int first = static_cast<int>(threadIdx.x) * 8;
  float v[8], mean = 0.0f, sum = 0.0f;
  if constexpr (kCentred) {
    for (int k = first; k < K; k += kRowThreads * 8) {
      load_eight(v, x, at + k, type);
      EXL_UNROLL
      for (int i = 0; i < 8; ++i) sum += v[i];
    }
    mean = block_sum(sum, s_sums) / static_cast<float>(K);
    sum = 0.0f;
  }
  for (int k = first; k < K; k += kRowThreads * 8) {
    load_eight(v, x, at + k, type);
    EXL_UNROLL
    for (int i = 0; i < 8; ++i) sum = fmaf(v[i] - mean, v[i] - mean, sum);
  }
  return RowNorm{mean, 1.0f / sqrtf(block_sum(sum, s_sums + kRowWarps) / static_cast<float>(K) + eps)};
}
