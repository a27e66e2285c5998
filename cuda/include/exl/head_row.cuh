#pragma once
// A warp prepares one head of one token for attention, in shared memory (row f32 [kD]): RMSNorm, RoPE, Hadamard rotation,
// quantization, store to the page. Lane i owns channels i, i + 32, ...
//
// Macros: page.cuh.
#include <exl/half.cuh>
#include <exl/page.cuh>

constexpr u32 kWarp = 0xffffffffu;

EXL_DEVICE float load_value(const void* x, size_t at, int type) {
  if (type == 0) return __half2float(static_cast<const half*>(x)[at]);
  if (type == 1) return __bfloat162float(static_cast<const bf16*>(x)[at]);
  return static_cast<const float*>(x)[at];
}

EXL_DEVICE float warp_sum(float s) {
  EXL_UNROLL
  for (int d = 16; d > 0; d /= 2) s += __shfl_xor_sync(kWarp, s, d);
  return s;
}

// row *= weight / rms(row)
EXL_DEVICE void normalise(float* row, const float* weight, float eps, int lane) {
  float s = 0.0f;
  for (int c = lane; c < kD; c += 32) s = fmaf(row[c], row[c], s);
  const float factor = 1.0f / sqrtf(warp_sum(s) / static_cast<float>(kD) + eps);
  for (int c = lane; c < kD; c += 32) row[c] = row[c] * factor * weight[c];
  __syncwarp();
}

// RoPE in the half-split layout: channels c and c + half_dim turn by the angle of cosine[c] and sine[c].
EXL_DEVICE void rotate_by_position(float* row, const float* cosine, const float* sine, int half_dim, int lane) {
  for (int c = lane; c < half_dim; c += 32) {
    const float low = row[c], high = row[c + half_dim];
    row[c] = low * cosine[c] - high * sine[c];
    row[c + half_dim] = high * cosine[c] + low * sine[c];
  }
  __syncwarp();
}

// Orthonormal Walsh-Hadamard transform of every run of kRotation channels; it is its own inverse. Done in registers:
// partners less than 32 channels apart are in other lanes, the others in the same lane.
EXL_DEVICE void rotate_by_hadamard(float* row, int lane) {
  if (kRotation == 1) return;
  constexpr int kOwn = (kD + 31) / 32;
  float x[kOwn];
  EXL_UNROLL
  for (int i = 0; i < kOwn; ++i) x[i] = i * 32 + lane < kD ? row[i * 32 + lane] : 0.0f;
  EXL_UNROLL
  for (int half_run = 1; half_run < kRotation && half_run < 32; half_run *= 2)
    EXL_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const float other = __shfl_xor_sync(kWarp, x[i], half_run);
      x[i] = lane & half_run ? other - x[i] : x[i] + other;
    }
  EXL_UNROLL
  for (int half_run = 1; half_run < kRotation / 32; half_run *= 2)
    EXL_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      if (i & half_run) continue;
      const float a = x[i], b = x[i + half_run];
      x[i] = a + b;
      x[i + half_run] = a - b;
    }
  const int log2 = 31 - __clz(kRotation);
  const float scale = log2 % 2 ? 0.70710678f / static_cast<float>(1 << log2 / 2) : 1.0f / static_cast<float>(1 << log2 / 2);
  EXL_UNROLL
  for (int i = 0; i < kOwn; ++i)
    if (i * 32 + lane < kD) row[i * 32 + lane] = x[i] * scale;
  __syncwarp();
}

// The value of largest magnitude in the warp, with its sign; ties go to the lowest lane.
EXL_DEVICE float extreme_of_warp(float x, int lane) {
  EXL_UNROLL
  for (int d = 1; d < 32; d *= 2) {
    const float other = __shfl_xor_sync(kWarp, x, d);
    const bool mine_first = (lane & d) == 0;
    if (fabsf(other) > fabsf(x) || (fabsf(other) == fabsf(x) && !mine_first)) x = other;
  }
  return x;
}

// Quantizes 32 values, one per lane (docs/memory.md). Returns the code of x, made unsigned by adding 2^(kBits - 1), and the
// group's scale.
template <int kBits> EXL_DEVICE u32 quantize_lane(float x, half& scale, int lane) {
  const float extreme = extreme_of_warp(x, lane);
  const float wanted = kBits == 8 ? fabsf(extreme) / 127.0f : extreme / -8.0f;
  scale = __float2half_rn(fminf(fmaxf(wanted, -65504.0f), 65504.0f));
  const float step = __half2float(scale);
  const float code = step == 0.0f ? 0.0f : rintf(x / step);
  const float low = kBits == 8 ? -127.0f : -8.0f, high = kBits == 8 ? 127.0f : 7.0f;
  return static_cast<u32>(static_cast<int>(fminf(fmaxf(code, low), high)) + (1 << (kBits - 1)));
}

// Stores a token's K (or V) row in its page. It writes only bytes (f16: halves) that hold nothing of other tokens.
template <bool kIsV> EXL_DEVICE void store_row(u8* page, int token, const float* row, int lane) {
  constexpr int kBits = kIsV ? kVBits : kKBits;
  EXL_NO_UNROLL   // runs once per token: keep the code short
  for (int start = 0; start < kD; start += 32) {
    const int channel = start + lane;
    const bool real = channel < kD;
    const float x = real ? row[channel] : 0.0f;
    const int at = kIsV ? v_code_at(token, real ? channel : 0) : k_code_at(token, real ? channel : 0);
    if constexpr (kBits == 16) {
      if (real) *reinterpret_cast<u16*>(page + at) = __half_as_ushort(saturated_half(x));
    } else {
      half scale;
      const u32 code = quantize_lane<kBits>(x, scale, lane);
      if constexpr (kBits == 8) {
        if (real) page[at] = static_cast<u8>(code);
      } else {
        int apart = kIsV ? 8 : 2;   // channels that share a byte
        if (kIsV && channel / 16 == kD / 16) apart = 4;
        const u32 partner = __shfl_sync(kWarp, code, lane ^ apart);
        if (real && (lane & apart) == 0) page[at] = static_cast<u8>(code | partner << 4);
      }
      const int scale_at = kIsV ? v_scale_at(token, start / 32) : k_scale_at(token, start / 32);
      if (lane == 0) *reinterpret_cast<u16*>(page + scale_at) = __half_as_ushort(scale);
    }
  }
}
