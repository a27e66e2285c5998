#pragma once
// 16-bit floating-point types, with the names and rounding of CUDA's own headers. NVRTC does not carry those, and exl
// needs no CUDA toolkit. Mostly storage and conversion: arithmetic is done in f32, or on pairs by ptx.cuh.
#include <exl/ptx.cuh>

struct half { u16 bits; };
struct alignas(4) half2 { half x, y; };
struct bf16 { u16 bits; };
struct alignas(4) bf162 { bf16 x, y; };

EXL_DEVICE half __ushort_as_half(u16 bits) { return half{bits}; }
EXL_DEVICE u16 __half_as_ushort(half h) { return h.bits; }
EXL_DEVICE u32 half2_bits(half2 h) { return h.x.bits | (static_cast<u32>(h.y.bits) << 16); }
EXL_DEVICE half2 bits_half2(u32 b) { return half2{half{static_cast<u16>(b)}, half{static_cast<u16>(b >> 16)}}; }

EXL_DEVICE float __half2float(half h) { return cvt_f32_f16(h.bits); }
EXL_DEVICE half __float2half_rn(float f) { return half{cvt_f16_f32(f)}; }
EXL_DEVICE half2 __floats2half2_rn(float x, float y) { return bits_half2(cvt_f16x2_f32(x, y)); }
EXL_DEVICE float __low2float(half2 h) { return __half2float(h.x); }
EXL_DEVICE float __high2float(half2 h) { return __half2float(h.y); }
EXL_DEVICE float2 __half22float2(half2 h) { return make_float2(__half2float(h.x), __half2float(h.y)); }
EXL_DEVICE half2 __hadd2(half2 a, half2 b) { return bits_half2(add_f16x2(half2_bits(a), half2_bits(b))); }
EXL_DEVICE half2 __hsub2(half2 a, half2 b) { return bits_half2(sub_f16x2(half2_bits(a), half2_bits(b))); }
EXL_DEVICE half2 __hmul2(half2 a, half2 b) { return bits_half2(mul_f16x2(half2_bits(a), half2_bits(b))); }
EXL_DEVICE half2 __hfma2(half2 a, half2 b, half2 c) {   // rounded once
  return bits_half2(fma_f16x2(half2_bits(a), half2_bits(b), half2_bits(c)));
}

EXL_DEVICE float __bfloat162float(bf16 h) { return cvt_f32_bf16(h.bits); }
EXL_DEVICE bf16 __float2bfloat16_rn(float f) { return bf16{cvt_bf16_f32(f)}; }
EXL_DEVICE bf162 __floats2bfloat162_rn(float x, float y) {
  const u32 b = cvt_bf16x2_f32(x, y);
  return bf162{bf16{static_cast<u16>(b)}, bf16{static_cast<u16>(b >> 16)}};
}

// Conversion of activations to f16: values beyond its range saturate at +-65504, because an infinity would spread NaN
// through attention and norms. NaN stays NaN.
EXL_DEVICE u32 saturated_half2(float x, float y) { return finite_f16x2(cvt_f16x2_f32(x, y)); }
EXL_DEVICE half saturated_half(float f) { return half{static_cast<u16>(finite_f16x2(cvt_f16_f32(f)))}; }

// The same names for all types, so that a kernel is written once.
EXL_DEVICE float to_float(half h) { return __half2float(h); }
EXL_DEVICE float to_float(bf16 h) { return __bfloat162float(h); }
EXL_DEVICE float to_float(float f) { return f; }
template <class T> EXL_DEVICE T from_float(float f);
template <> EXL_DEVICE half from_float<half>(float f) { return __float2half_rn(f); }
template <> EXL_DEVICE bf16 from_float<bf16>(float f) { return __float2bfloat16_rn(f); }
template <> EXL_DEVICE float from_float<float>(float f) { return f; }
