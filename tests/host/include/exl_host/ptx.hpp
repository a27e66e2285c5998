#pragma once
// ptx.cuh's instructions, evaluated by g++ from the tables of the PTX ISA.

template <u32 kTable> EXL_DEVICE u32 lop3(u32 a, u32 b, u32 c) {
  u32 d = 0;
  for (u32 i = 0; i < 8; ++i)
    if ((kTable >> i) & 1) d |= ((i & 4) ? a : ~a) & ((i & 2) ? b : ~b) & ((i & 1) ? c : ~c);
  return d;
}
EXL_DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
  const u64 bytes = (static_cast<u64>(b) << 32) | a;
  u32 d = 0;
  for (u32 i = 0; i < 4; ++i) {
    const u32 s = selector >> (4 * i);
    u32 byte = static_cast<u32>((bytes >> (8 * (s & 7))) & 0xff);
    if (s & 8) byte = (byte & 0x80) ? 0xff : 0;
    d |= byte << (8 * i);
  }
  return d;
}

// ---- f16 on the compiler's _Float16; a NaN result is 0x7fff, as on the GPU -----------------------------------------

EXL_DEVICE float cvt_f32_f16(u16 h) { return static_cast<float>(exl_bit_cast<_Float16>(h)); }
EXL_DEVICE u16 cvt_f16_f32(float f) { return __builtin_isnan(f) ? u16(0x7fff) : exl_bit_cast<u16>(static_cast<_Float16>(f)); }
EXL_DEVICE u32 cvt_f16x2_f32(float lo, float hi) { return cvt_f16_f32(lo) | (static_cast<u32>(cvt_f16_f32(hi)) << 16); }
EXL_DEVICE float cvt_f32_bf16(u16 h) { return __uint_as_float(static_cast<u32>(h) << 16); }
EXL_DEVICE u16 cvt_bf16_f32(float f) {
  const u32 bits = __float_as_uint(f);
  return __builtin_isnan(f) ? u16(0x7fff) : static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
EXL_DEVICE u32 cvt_bf16x2_f32(float lo, float hi) { return cvt_bf16_f32(lo) | (static_cast<u32>(cvt_bf16_f32(hi)) << 16); }

// f32 holds a sum or product of two halves well enough (24 >= 2 * 11 + 2 bits) that rounding twice is rounding once.
// A fused product and sum needs double: 22-bit products against an 11-bit addend, ties decided within 53 bits.
EXL_DEVICE u16 exl_f16_add(u16 a, u16 b) { return cvt_f16_f32(cvt_f32_f16(a) + cvt_f32_f16(b)); }
EXL_DEVICE u16 exl_f16_mul(u16 a, u16 b) { return cvt_f16_f32(cvt_f32_f16(a) * cvt_f32_f16(b)); }
EXL_DEVICE u16 exl_f16_fma(u16 a, u16 b, u16 c) {
  const double d = static_cast<double>(cvt_f32_f16(a)) * cvt_f32_f16(b) + cvt_f32_f16(c);
  return __builtin_isnan(d) ? u16(0x7fff) : exl_bit_cast<u16>(static_cast<_Float16>(d));
}
#define EXL_LO(v) static_cast<u16>(v)
#define EXL_HI(v) static_cast<u16>((v) >> 16)
EXL_DEVICE u32 add_f16x2(u32 a, u32 b) { return exl_f16_add(EXL_LO(a), EXL_LO(b)) | (static_cast<u32>(exl_f16_add(EXL_HI(a), EXL_HI(b))) << 16); }
EXL_DEVICE u32 sub_f16x2(u32 a, u32 b) { return add_f16x2(a, b ^ 0x80008000u); }
EXL_DEVICE u32 mul_f16x2(u32 a, u32 b) { return exl_f16_mul(EXL_LO(a), EXL_LO(b)) | (static_cast<u32>(exl_f16_mul(EXL_HI(a), EXL_HI(b))) << 16); }
EXL_DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {
  return exl_f16_fma(EXL_LO(a), EXL_LO(b), EXL_LO(c)) | (static_cast<u32>(exl_f16_fma(EXL_HI(a), EXL_HI(b), EXL_HI(c))) << 16);
}
#undef EXL_LO
#undef EXL_HI
EXL_DEVICE float ex2_approx(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

// ---- collectives ---------------------------------------------------------------------------------------------------

EXL_DEVICE void exl_store(FragC& d, ExlFrag f) { d.r[0] = f.r[0]; d.r[1] = f.r[1]; d.r[2] = f.r[2]; d.r[3] = f.r[3]; }
EXL_DEVICE void mma_m16n8k8(FragC& d, u32 a0, u32 a1, u32 b0) {
  exl_store(d, exl_mma(a0, a1, 0, 0, b0, 0, d.r[0], d.r[1], d.r[2], d.r[3], 2));
}
EXL_DEVICE void mma_m16n8k16(FragC& d, const FragA& a, const FragB& b) {
  exl_store(d, exl_mma(a.r[0], a.r[1], a.r[2], a.r[3], b.r[0], b.r[1], d.r[0], d.r[1], d.r[2], d.r[3], 0));
}
EXL_DEVICE void mma_m16n8k16_bf16(FragC& d, const FragA& a, const FragB& b) {
  exl_store(d, exl_mma(a.r[0], a.r[1], a.r[2], a.r[3], b.r[0], b.r[1], d.r[0], d.r[1], d.r[2], d.r[3], 1));
}
EXL_DEVICE u32 ldmatrix_x1(const void* row) { return exl_ldmatrix(row, 1, 0).r[0]; }
EXL_DEVICE uint2 ldmatrix_x2(const void* row) { const ExlWords w = exl_ldmatrix(row, 2, 0); return {w.r[0], w.r[1]}; }
EXL_DEVICE uint4 ldmatrix_x4(const void* row) { const ExlWords w = exl_ldmatrix(row, 4, 0); return {w.r[0], w.r[1], w.r[2], w.r[3]}; }
EXL_DEVICE u32 ldmatrix_x1_trans(const void* row) { return exl_ldmatrix(row, 1, 1).r[0]; }
EXL_DEVICE uint2 ldmatrix_x2_trans(const void* row) { const ExlWords w = exl_ldmatrix(row, 2, 1); return {w.r[0], w.r[1]}; }
EXL_DEVICE uint4 ldmatrix_x4_trans(const void* row) { const ExlWords w = exl_ldmatrix(row, 4, 1); return {w.r[0], w.r[1], w.r[2], w.r[3]}; }
EXL_DEVICE u32 movmatrix_trans(u32 a) { return exl_movmatrix(a); }

// ---- memory --------------------------------------------------------------------------------------------------------

EXL_DEVICE void cp_async_16(void* dst, const void* src, u32 src_bytes = 16) { exl_cp_async(dst, src, 16, src_bytes); }
EXL_DEVICE void cp_async_8(void* dst, const void* src, u32 src_bytes = 8) { exl_cp_async(dst, src, 8, src_bytes); }
EXL_DEVICE void cp_async_4(void* dst, const void* src, u32 src_bytes = 4) { exl_cp_async(dst, src, 4, src_bytes); }
EXL_DEVICE void cp_async_commit_group() { exl_cp_async_commit(); }
template <int kPending> EXL_DEVICE void cp_async_wait_group() { static_assert(kPending >= 0, ""); exl_cp_async_wait(kPending); }
EXL_DEVICE u32 ld_global_nc_u32(const void* p) { return *static_cast<const u32*>(p); }
EXL_DEVICE uint2 ld_global_nc_u32x2(const void* p) { return *static_cast<const uint2*>(p); }
EXL_DEVICE uint4 ld_global_nc_u32x4(const void* p) { return *static_cast<const uint4*>(p); }
EXL_DEVICE void griddepcontrol_wait() { exl_griddepcontrol_wait(); }
EXL_DEVICE void griddepcontrol_launch_dependents() { exl_griddepcontrol_launch(); }
