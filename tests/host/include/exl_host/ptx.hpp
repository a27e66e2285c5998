#pragma once
// ptx.cuh's instructions, evaluated by g++ from the tables of the PTX ISA.

template <u32 kTable> EXL_DEVICE u32 lop3(u32 a, u32 b, u32 c) {
  u32 d = 0;
  if constexpr (kTable & 1) d |= ~a & ~b & ~c;
  if constexpr (kTable & 2) d |= ~a & ~b & c;
  if constexpr (kTable & 4) d |= ~a & b & ~c;
  if constexpr (kTable & 8) d |= ~a & b & c;
  if constexpr (kTable & 16) d |= a & ~b & ~c;
  if constexpr (kTable & 32) d |= a & ~b & c;
  if constexpr (kTable & 64) d |= a & b & ~c;
  if constexpr (kTable & 128) d |= a & b & c;
  return d;
}
EXL_DEVICE u32 prmt(u32 a, u32 b, u32 selector) { return exl_prmt(a, b, selector); }

// ---- 16-bit floating point, in the runtime, which no sanitizer instruments ------------------------------------------

EXL_DEVICE float cvt_f32_f16(u16 h) { return exl_f32_from_f16(h); }
EXL_DEVICE u16 cvt_f16_f32(float f) { return exl_f16_from_f32(f); }
EXL_DEVICE u32 cvt_f16x2_f32(float lo, float hi) { return exl_f16x2_from_f32(lo, hi); }
EXL_DEVICE float cvt_f32_bf16(u16 h) { return __uint_as_float(static_cast<u32>(h) << 16); }
EXL_DEVICE u16 cvt_bf16_f32(float f) { return exl_bf16_from_f32(f); }
EXL_DEVICE u32 cvt_bf16x2_f32(float lo, float hi) {
  return exl_bf16_from_f32(lo) | (static_cast<u32>(exl_bf16_from_f32(hi)) << 16);
}
EXL_DEVICE u32 add_f16x2(u32 a, u32 b) { return exl_add_f16x2(a, b); }
EXL_DEVICE u32 sub_f16x2(u32 a, u32 b) { return exl_add_f16x2(a, b ^ 0x80008000u); }
EXL_DEVICE u32 finite_f16x2(u32 a) {
  u32 d = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    u32 h = a >> shift & 0xffffu;
    if ((h & 0x7fffu) == 0x7c00u) h -= 1;
    if (EXL_ARCH >= 80 && (h & 0x7fffu) > 0x7c00u) h = 0x7fffu;   // the NaN that min and max return
    d |= h << shift;
  }
  return d;
}
EXL_DEVICE u32 mul_f16x2(u32 a, u32 b) { return exl_mul_f16x2(a, b); }
EXL_DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) { return exl_fma_f16x2(a, b, c); }
EXL_DEVICE float ex2_approx(float x) {
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
}

// ---- collectives ---------------------------------------------------------------------------------------------------

EXL_DEVICE void exl_store(FragC& d, ExlFrag f) {
  d.r[0] = f.r[0];
  d.r[1] = f.r[1];
  d.r[2] = f.r[2];
  d.r[3] = f.r[3];
}
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
EXL_DEVICE uint2 ldmatrix_x2(const void* row) {
  const ExlWords w = exl_ldmatrix(row, 2, 0);
  return {w.r[0], w.r[1]};
}
EXL_DEVICE uint4 ldmatrix_x4(const void* row) {
  const ExlWords w = exl_ldmatrix(row, 4, 0);
  return {w.r[0], w.r[1], w.r[2], w.r[3]};
}
EXL_DEVICE u32 ldmatrix_x1_trans(const void* row) { return exl_ldmatrix(row, 1, 1).r[0]; }
EXL_DEVICE uint2 ldmatrix_x2_trans(const void* row) {
  const ExlWords w = exl_ldmatrix(row, 2, 1);
  return {w.r[0], w.r[1]};
}
EXL_DEVICE uint4 ldmatrix_x4_trans(const void* row) {
  const ExlWords w = exl_ldmatrix(row, 4, 1);
  return {w.r[0], w.r[1], w.r[2], w.r[3]};
}
EXL_DEVICE u32 movmatrix_trans(u32 a) { return exl_movmatrix(a); }

// ---- memory --------------------------------------------------------------------------------------------------------

EXL_DEVICE void cp_async_16(void* dst, const void* src, u32 src_bytes = 16) { exl_cp_async(dst, src, 16, src_bytes); }
EXL_DEVICE void cp_async_8(void* dst, const void* src, u32 src_bytes = 8) { exl_cp_async(dst, src, 8, src_bytes); }
EXL_DEVICE void cp_async_4(void* dst, const void* src, u32 src_bytes = 4) { exl_cp_async(dst, src, 4, src_bytes); }
EXL_DEVICE void cp_async_commit_group() { exl_cp_async_commit(); }
template <int kPending> EXL_DEVICE void cp_async_wait_group() {
  static_assert(kPending >= 0, "");
  exl_cp_async_wait(kPending);
}
EXL_DEVICE u32 ld_global_nc_u32(const void* p) { return *static_cast<const u32*>(p); }
EXL_DEVICE uint2 ld_global_nc_u32x2(const void* p) { return *static_cast<const uint2*>(p); }
EXL_DEVICE uint4 ld_global_nc_u32x4(const void* p) { return *static_cast<const uint4*>(p); }
EXL_DEVICE void griddepcontrol_wait() { exl_griddepcontrol_wait(); }
EXL_DEVICE void griddepcontrol_launch_dependents() { exl_griddepcontrol_launch(); }
