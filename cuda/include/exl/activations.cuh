#pragma once
// Loads activations as f16 for the tensor cores (or as f32). Three kinds of input:
//   kHalfInput    f16
//   kBfloatInput  bf16, scaled into f16's range by a power of two per token and slice
//   kNormedInput  f32, normalised: x * (1 / rms) * weight, then rounded to f16 once, saturated
#include <exl/half.cuh>

constexpr int kHalfInput = 0, kBfloatInput = 1, kNormedInput = 2;

// The activations of a launch: x [num_tokens, stride] in the kind's type; stride and K are multiples of 8.
struct Input {
  const void* x;
  const float* sumsq;    // kNormedInput: f32 [num_tokens, ceil(K / 16)], sums of squares of 16 channels each
  const float* norm;     // kNormedInput: f32 [K]
  float eps;
  int K, stride, num_tokens;
};

// Eight inputs from channel k on, in f32. `factor`: kBfloatInput: the token's power of two; kNormedInput: its 1 / rms.
template <int kKind> EXL_DEVICE void load_floats(float (&out)[8], const Input& in, int token, int k, float factor) {
  const size_t at = static_cast<size_t>(token) * in.stride + k;
  if constexpr (kKind == kNormedInput) {
    const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(in.x) + at);
    const float4* w = reinterpret_cast<const float4*>(in.norm + k);
    const float4 a = p[0], b = p[1], u = w[0], v = w[1];
    out[0] = a.x * factor * u.x; out[1] = a.y * factor * u.y; out[2] = a.z * factor * u.z; out[3] = a.w * factor * u.w;
    out[4] = b.x * factor * v.x; out[5] = b.y * factor * v.y; out[6] = b.z * factor * v.z; out[7] = b.w * factor * v.w;
  } else {
    const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const u16*>(in.x) + at);
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
    EXL_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kKind == kHalfInput) {
        out[2 * i] = __low2float(bits_half2(pairs[i]));
        out[2 * i + 1] = __high2float(bits_half2(pairs[i]));
      } else {
        out[2 * i] = __uint_as_float(pairs[i] << 16) * factor;
        out[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u) * factor;
      }
    }
  }
}

// The same, rounded to f16.
template <int kKind> EXL_DEVICE uint4 load_inputs(const Input& in, int token, int k, float factor) {
  if constexpr (kKind == kHalfInput) {
    return *reinterpret_cast<const uint4*>(static_cast<const half*>(in.x) + static_cast<size_t>(token) * in.stride + k);
  } else {
    float v[8];
    load_floats<kKind>(v, in, token, k, factor);
    if constexpr (kKind == kNormedInput)   // bf16 cannot overflow: its factor brought it into range
      return make_uint4(saturated_half2(v[0], v[1]), saturated_half2(v[2], v[3]), saturated_half2(v[4], v[5]), saturated_half2(v[6], v[7]));
    return make_uint4(cvt_f16x2_f32(v[0], v[1]), cvt_f16x2_f32(v[2], v[3]), cvt_f16x2_f32(v[4], v[5]), cvt_f16x2_f32(v[6], v[7]));
  }
}

// into_range: the power of two that brings a row below 2^15, given the bf16 bits of the row's largest magnitude.
// out_of_range: its inverse. Both are normal numbers, so multiplying by them is exact.
EXL_DEVICE u32 clamped_exponent(u32 max_bits) { return (max_bits >> 7) < 15 ? 15 : max_bits >> 7; }
EXL_DEVICE float into_range(u32 max_bits) { return __uint_as_float((268 - clamped_exponent(max_bits)) << 23); }
EXL_DEVICE float out_of_range(u32 max_bits) { return __uint_as_float((clamped_exponent(max_bits) - 14) << 23); }

// Largest of `before` and the magnitudes of two bf16, as bits without sign.
EXL_DEVICE u32 max_magnitude(u32 pair, u32 before) {
  const u32 lo = pair & 0x7fffu, hi = (pair >> 16) & 0x7fffu, m = lo > hi ? lo : hi;
  return m > before ? m : before;
}

// Largest magnitude in channels [start, stop) of one token, found by a warp; all lanes get it.
EXL_DEVICE u32 warp_max_magnitude(const Input& in, int token, int start, int stop, int lane) {
  const bf16* row = static_cast<const bf16*>(in.x) + static_cast<size_t>(token) * in.stride;
  u32 m = 0;
  for (int k = start + lane * 8; k < stop; k += 256) {
    const uint4 v = *reinterpret_cast<const uint4*>(row + k);
    m = max_magnitude(v.x, max_magnitude(v.y, max_magnitude(v.z, max_magnitude(v.w, m))));
  }
  EXL_UNROLL
  for (int d = 16; d > 0; d /= 2) {
    const u32 other = __shfl_xor_sync(0xffffffffu, m, d);
    m = other > m ? other : m;
  }
  return m;
}

// 1 / sqrt(mean of squares + eps) of one token, computed by a warp; all lanes get it. The order of the sum depends only on
// the number of channels.
EXL_DEVICE float warp_inverse_rms(const Input& in, int token, int lane) {
  const int count = (in.K + 15) / 16;
  const float* sums = in.sumsq + static_cast<size_t>(token) * count;
  float s = 0.0f;
  for (int i = lane; i < count; i += 32) s += sums[i];
  EXL_UNROLL
  for (int d = 16; d > 0; d /= 2) s += __shfl_xor_sync(0xffffffffu, s, d);
  return 1.0f / sqrtf(s / static_cast<float>(in.K) + in.eps);
}
