#pragma once
// 16-bit floating point by the compiler's _Float16, rounded as on the GPU. A NaN result is 0x7fff, as on the GPU.
#include <stdint.h>
#include <string.h>
#if defined(__F16C__) && defined(__AVX__)
#include <immintrin.h>
#endif

namespace exl_host {

inline float half_to_float(uint16_t bits) {
  _Float16 h;
  memcpy(&h, &bits, 2);
  return static_cast<float>(h);
}
inline uint16_t float_to_half(float f) {
  if (f != f) return 0x7fff;
  const _Float16 h = static_cast<_Float16>(f);
  uint16_t bits;
  memcpy(&bits, &h, 2);
  return bits;
}
inline float bfloat_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}
inline uint16_t float_to_bfloat(float f) {
  if (f != f) return 0x7fff;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// a * b + c rounded once. The product of two halves is exact in f32; the sum's error is computed exactly (Knuth's TwoSum)
// and folded into its last bit (round to odd), after which rounding to 11 bits is correct (Boldo and Melquiond, 2008).
inline uint16_t half_fma(uint16_t a, uint16_t b, uint16_t c) {
  const float p = half_to_float(a) * half_to_float(b), q = half_to_float(c);
  float s = p + q;
  const float t = s - p, error = (p - (s - t)) + (q - t);
  if (error != 0 && error == error) {  // the error is NaN if the sum is infinite
    uint32_t bits;
    memcpy(&bits, &s, 4);
    if ((error > 0) != (s > 0)) --bits;
    bits |= 1;
    memcpy(&s, &bits, 4);
  }
  return float_to_half(s);
}

// Converts `count` halves to floats; eight or four by one instruction if the CPU has F16C.
inline void halves_to_floats(const uint16_t* in, float* out, int count) {
#if defined(__F16C__) && defined(__AVX__)
  if (count == 8) {
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in))));
    return;
  }
  if (count == 4) {
    _mm_storeu_ps(out, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(in))));
    return;
  }
#endif
  for (int i = 0; i < count; ++i) out[i] = half_to_float(in[i]);
}

}  // namespace exl_host

extern "C" {
uint32_t exl_prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = (static_cast<uint64_t>(b) << 32) | a;
  uint32_t d = 0;
  for (uint32_t i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i);
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = (byte & 0x80) ? 0xff : 0;  // fill with that byte's sign
    d |= byte << (8 * i);
  }
  return d;
}
float exl_f32_from_f16(uint16_t h) { return exl_host::half_to_float(h); }
uint16_t exl_f16_from_f32(float f) { return exl_host::float_to_half(f); }
uint32_t exl_f16x2_from_f32(float lo, float hi) {
  return exl_host::float_to_half(lo) | (static_cast<uint32_t>(exl_host::float_to_half(hi)) << 16);
}
uint16_t exl_bf16_from_f32(float f) { return exl_host::float_to_bfloat(f); }

// f32 has enough bits (24 >= 2 * 11 + 2) that rounding a sum or product of two halves to f32, then to f16, rounds as once.
#define EXL_PAIRWISE(expression)                                                         \
  uint32_t d = 0;                                                                        \
  for (int i = 0; i < 32; i += 16) {                                                     \
    const uint16_t x = static_cast<uint16_t>(a >> i), y = static_cast<uint16_t>(b >> i); \
    d |= static_cast<uint32_t>(expression) << i;                                         \
  }                                                                                      \
  return d
uint32_t exl_add_f16x2(uint32_t a, uint32_t b) {
  EXL_PAIRWISE(exl_host::float_to_half(exl_host::half_to_float(x) + exl_host::half_to_float(y)));
}
uint32_t exl_mul_f16x2(uint32_t a, uint32_t b) {
  EXL_PAIRWISE(exl_host::float_to_half(exl_host::half_to_float(x) * exl_host::half_to_float(y)));
}
uint32_t exl_fma_f16x2(uint32_t a, uint32_t b, uint32_t c) {
  EXL_PAIRWISE(exl_host::half_fma(x, y, static_cast<uint16_t>(c >> i)));
}
#undef EXL_PAIRWISE
}
