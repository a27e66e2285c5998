#pragma once
// Activations on their way to the tensor cores, as f16.
//
// Macro EXL_INPUT: 0 f16; 1 bf16, brought into f16's range by a power of two of its token and slice; 2 f32, normalised:
// x * rms * weight, rounded to f16 at once.
#include <exl/half.cuh>

constexpr int kInput = EXL_INPUT;
constexpr int kInputHalf = 0, kInputBfloat = 1, kInputNormed = 2;

// Eight inputs as f16. `factor`: the token's power of two, or its 1 / rms.
EXL_DEVICE uint4 load_inputs(const void* x, size_t at, float factor, const float* weight) {
  if constexpr (kInput == kInputHalf) return *reinterpret_cast<const uint4*>(static_cast<const half*>(x) + at);
  if constexpr (kInput == kInputBfloat) {
    const uint4 v = *reinterpret_cast<const uint4*>(static_cast<const bf16*>(x) + at);
    const u32 in[4] = {v.x, v.y, v.z, v.w};
    u32 out[4];
    EXL_UNROLL
    for (int i = 0; i < 4; ++i)
      out[i] = cvt_f16x2_f32(__uint_as_float(in[i] << 16) * factor, __uint_as_float(in[i] & 0xffff0000u) * factor);
    return make_uint4(out[0], out[1], out[2], out[3]);
  }
  if constexpr (kInput == kInputNormed) {
    const float4* p = reinterpret_cast<const float4*>(static_cast<const float*>(x) + at);
    const float4* q = reinterpret_cast<const float4*>(weight);
    const float4 a = p[0], b = p[1], u = q[0], v = q[1];
    return make_uint4(cvt_f16x2_f32(a.x * factor * u.x, a.y * factor * u.y), cvt_f16x2_f32(a.z * factor * u.z, a.w * factor * u.w),
                      cvt_f16x2_f32(b.x * factor * v.x, b.y * factor * v.y), cvt_f16x2_f32(b.z * factor * v.z, b.w * factor * v.w));
  }
}

// The power of two that brings a row whose largest magnitude has these bf16 bits below 2^15, and its inverse. Both are
// normal numbers, so multiplying by them is exact.
EXL_DEVICE int clamped_exponent(u32 max_bits) { return static_cast<int>(max_bits >> 7) < 15 ? 15 : static_cast<int>(max_bits >> 7); }
EXL_DEVICE float into_range(u32 max_bits) { return __uint_as_float(static_cast<u32>(268 - clamped_exponent(max_bits)) << 23); }
EXL_DEVICE float out_of_range(u32 max_bits) { return __uint_as_float(static_cast<u32>(clamped_exponent(max_bits) - 14) << 23); }

// Largest magnitude among two bf16, as bits without their sign.
EXL_DEVICE u32 max_magnitude(u32 pair, u32 so_far) {
  const u32 lo = pair & 0x7fffu, hi = (pair >> 16) & 0x7fffu, m = lo > hi ? lo : hi;
  return m > so_far ? m : so_far;
}

// The same for inputs [k0, k1) of one token; all lanes of the warp get it.
EXL_DEVICE u32 warp_max_magnitude(const bf16* row, int k0, int k1, int lane) {
  u32 m = 0;
  for (int k = k0 + lane * 8; k < k1; k += 256) {
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

// 1 / sqrt(mean of squares + eps) of one token from its sums over 16 channels each, added in an order that depends on
// the number of channels alone. All lanes of the warp get it.
EXL_DEVICE float warp_inverse_rms(const float* sums, int num_channels, float eps, int lane) {
  float s = 0.0f;
  for (int i = lane; i < (num_channels + 15) / 16; i += 32) s += sums[i];
  EXL_UNROLL
  for (int d = 16; d > 0; d /= 2) s += __shfl_xor_sync(0xffffffffu, s, d);
  return 1.0f / sqrtf(s / static_cast<float>(num_channels) + eps);
}
