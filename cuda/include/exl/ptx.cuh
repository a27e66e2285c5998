#pragma once
// PTX instructions that CUDA C++ cannot express, or not well. The only file with `asm` and with tests of the architecture:
// each wrapper is named after its instruction and holds its own fallback. Reference: "Parallel Thread Execution ISA".
// Under EXL_HOST the same names are emulated from the lane maps of that document (tests/host).
//
// Halves travel as bits: u32 for a pair (element 0 in the low half), u16 for one. half.cuh gives them types.
#include <exl/platform.cuh>

constexpr bool kHasMma = EXL_ARCH >= 75;         // mma with f16 inputs, ldmatrix, movmatrix
constexpr bool kHasCpAsync = EXL_ARCH >= 80;     // below, cp_async_* are plain copies: prefetch into registers instead
constexpr bool kHasBf16Mma = EXL_ARCH >= 80;     // mma with bf16 inputs
constexpr bool kHasGridControl = EXL_ARCH >= 90; // programmatic dependent launch

// Operand fragments of mma.m16n8k16 with 16-bit inputs: lane 4 g + t (g 0..7, t 0..3) holds
struct FragA { u32 r[4]; };   // 16 x 16, row major: r[0] row g, r[1] row g + 8, columns 2t, 2t+1; r[2], r[3]: columns + 8
struct FragB { u32 r[2]; };   // 16 x 8, column major: column g; r[0] rows 2t, 2t+1; r[1] rows 2t+8, 2t+9
struct FragC { float r[4]; }; // 16 x 8: r[0], r[1] row g, columns 2t, 2t+1; r[2], r[3] row g + 8

#if defined(EXL_HOST)
#include <exl_host/ptx.hpp>
#else

// ---- bits ----------------------------------------------------------------------------------------------------------

// Any bitwise function of three words: bit i of the result is bit (4 a_i + 2 b_i + c_i) of kTable. One instruction, for
// which a compiler may emit two. kTable is the function applied to 0xf0, 0xcc, 0xaa: (a & b) | c is 0xea.
template <u32 kTable> EXL_DEVICE u32 lop3(u32 a, u32 b, u32 c) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(d) : "r"(a), "r"(b), "r"(c), "n"(kTable));
  return d;
}

// Picks four bytes from the eight of {b, a} (b high): nibble i of `selector` is the source of byte i; if its bit 3 is set,
// that byte's sign bit fills the byte. Widens bytes to halves in one instruction.
EXL_DEVICE u32 prmt(u32 a, u32 b, u32 selector) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

// ---- pairs of f16: one instruction for two, round to nearest even, subnormals kept ---------------------------------

EXL_DEVICE u32 add_f16x2(u32 a, u32 b) {
  u32 d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
EXL_DEVICE u32 sub_f16x2(u32 a, u32 b) {
  u32 d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
EXL_DEVICE u32 mul_f16x2(u32 a, u32 b) {
  u32 d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
EXL_DEVICE u32 fma_f16x2(u32 a, u32 b, u32 c) {   // a * b + c, rounded once
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Infinities become +-65504, the largest finite halves; NaN stays NaN (0x7fff from sm_80 on, where min and max of pairs
// are instructions), everything else is left alone.
EXL_DEVICE u32 finite_f16x2(u32 a) {
#if __CUDA_ARCH__ >= 800
  u32 d;
  asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(0x7bff7bffu));
  asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(d) : "r"(0xfbfffbffu));
  return d;
#else
  const u32 low = (a & 0x7fffu) == 0x7c00u ? 1u : 0u, high = (a & 0x7fff0000u) == 0x7c000000u ? 0x10000u : 0u;
  return a - low - high;
#endif
}

// ---- conversions: the CUDA headers with the same functions are not part of NVRTC, and exl needs nothing installed -----

EXL_DEVICE float cvt_f32_f16(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
EXL_DEVICE u16 cvt_f16_f32(float f) {   // to nearest even
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
EXL_DEVICE u32 cvt_f16x2_f32(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));   // the first source goes to the high half
  return d;
#else
  return cvt_f16_f32(lo) | (static_cast<u32>(cvt_f16_f32(hi)) << 16);
#endif
}
EXL_DEVICE float cvt_f32_bf16(u16 h) { return __uint_as_float(static_cast<u32>(h) << 16); }   // exact
EXL_DEVICE u16 cvt_bf16_f32(float f) {   // to nearest even; NaN becomes 0x7fff as in hardware
#if __CUDA_ARCH__ >= 800
  u16 h;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
#else
  const u32 bits = __float_as_uint(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<u16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
EXL_DEVICE u32 cvt_bf16x2_f32(float lo, float hi) {
#if __CUDA_ARCH__ >= 800
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(hi), "f"(lo));
  return d;
#else
  return cvt_bf16_f32(lo) | (static_cast<u32>(cvt_bf16_f32(hi)) << 16);
#endif
}

// 2^x within 2 ulp, results below 2^-126 flushed to zero. exp2f would need the fast-math option to become this.
EXL_DEVICE float ex2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- tensor cores: reached by all 32 lanes -------------------------------------------------------------------------

// d += a[0..1] b[0]: 16x8 times 8x8, f16 inputs, f32 sums. The only shape of sm_75.
EXL_DEVICE void mma_m16n8k8(FragC& d, u32 a0, u32 a1, u32 b0) {
#if __CUDA_ARCH__ >= 750
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(d.r[0]), "+f"(d.r[1]), "+f"(d.r[2]), "+f"(d.r[3])
               : "r"(a0), "r"(a1), "r"(b0));
#else
  __trap();   // no tensor cores: kernels must test kHasMma
#endif
}

// d += a b: 16x16 times 16x8, f16 inputs, f32 sums.
EXL_DEVICE void mma_m16n8k16(FragC& d, const FragA& a, const FragB& b) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d.r[0]), "+f"(d.r[1]), "+f"(d.r[2]), "+f"(d.r[3])
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#else
  mma_m16n8k8(d, a.r[0], a.r[1], b.r[0]);
  mma_m16n8k8(d, a.r[2], a.r[3], b.r[1]);
#endif
}

// The same with bf16 inputs; sm_80 and up, no fallback: older tensor cores do not know the format.
EXL_DEVICE void mma_m16n8k16_bf16(FragC& d, const FragA& a, const FragB& b) {
#if __CUDA_ARCH__ >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d.r[0]), "+f"(d.r[1]), "+f"(d.r[2]), "+f"(d.r[3])
      : "r"(a.r[0]), "r"(a.r[1]), "r"(a.r[2]), "r"(a.r[3]), "r"(b.r[0]), "r"(b.r[1]));
#else
  __trap();
#endif
}

// ---- shared memory -------------------------------------------------------------------------------------------------

// Shared-memory address for PTX: a 32-bit offset in the shared space.
EXL_DEVICE u32 smem_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// 8x8 matrices of 16-bit elements from shared memory into fragment order: lane l's `row` is the 16-byte row l % 8 of
// matrix l / 8 (x1 uses the rows of lanes 0..7, x2 of 0..15, x4 of all). Lane 4 g + t gets elements (g, 2t), (g, 2t+1) of each
// matrix; with _trans (2t, g), (2t+1, g). Rows are aligned to 16 bytes. Does not order memory: __syncwarp first.
EXL_DEVICE u32 ldmatrix_x1(const void* row) {
  u32 r = 0;
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(smem_address(row)) : "memory");
#else
  __trap();
#endif
  return r;
}
EXL_DEVICE uint2 ldmatrix_x2(const void* row) {
  uint2 r = make_uint2(0, 0);
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r.x), "=r"(r.y) : "r"(smem_address(row)) : "memory");
#else
  __trap();
#endif
  return r;
}
EXL_DEVICE uint4 ldmatrix_x4(const void* row) {
  uint4 r = make_uint4(0, 0, 0, 0);
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(smem_address(row)) : "memory");
#else
  __trap();
#endif
  return r;
}
EXL_DEVICE u32 ldmatrix_x1_trans(const void* row) {
  u32 r = 0;
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r) : "r"(smem_address(row)) : "memory");
#else
  __trap();
#endif
  return r;
}
EXL_DEVICE uint2 ldmatrix_x2_trans(const void* row) {
  uint2 r = make_uint2(0, 0);
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r.x), "=r"(r.y) : "r"(smem_address(row)) : "memory");
#else
  __trap();
#endif
  return r;
}
EXL_DEVICE uint4 ldmatrix_x4_trans(const void* row) {
  uint4 r = make_uint4(0, 0, 0, 0);
#if __CUDA_ARCH__ >= 750
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "r"(smem_address(row)) : "memory");
#else
  __trap();
#endif
  return r;
}

// Transposes an 8x8 matrix of 16-bit elements held in fragment order, without shared memory.
EXL_DEVICE u32 movmatrix_trans(u32 a) {
  u32 d = 0;
#if __CUDA_ARCH__ >= 750
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
#else
  __trap();
#endif
  return d;
}

// ---- asynchronous copies, global to shared -------------------------------------------------------------------------

// Starts a copy of 16 (8, 4) bytes; both addresses are aligned to that size. The bytes are visible to this lane after
// cp_async_wait_group, to other lanes after a barrier following it. `src_bytes` bytes are read, zeros fill the rest; with 0
// nothing is read, but `src` must still be a valid address. Below sm_80 the copy is done at once.
EXL_DEVICE void cp_async_16(void* dst, const void* src, u32 src_bytes = 16) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(smem_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(src_bytes) : "memory");
#else
  u8* d = static_cast<u8*>(dst);
  const u8* s = static_cast<const u8*>(src);
  if (src_bytes == 16) *reinterpret_cast<uint4*>(d) = *reinterpret_cast<const uint4*>(s);
  else
    for (u32 i = 0; i < 16; ++i) d[i] = i < src_bytes ? s[i] : 0;
#endif
}
EXL_DEVICE void cp_async_8(void* dst, const void* src, u32 src_bytes = 8) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :: "r"(smem_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(src_bytes) : "memory");
#else
  u8* d = static_cast<u8*>(dst);
  const u8* s = static_cast<const u8*>(src);
  if (src_bytes == 8) *reinterpret_cast<uint2*>(d) = *reinterpret_cast<const uint2*>(s);
  else
    for (u32 i = 0; i < 8; ++i) d[i] = i < src_bytes ? s[i] : 0;
#endif
}
EXL_DEVICE void cp_async_4(void* dst, const void* src, u32 src_bytes = 4) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
               :: "r"(smem_address(dst)), "l"(__cvta_generic_to_global(src)), "r"(src_bytes) : "memory");
#else
  u8* d = static_cast<u8*>(dst);
  const u8* s = static_cast<const u8*>(src);
  for (u32 i = 0; i < 4; ++i) d[i] = i < src_bytes ? s[i] : 0;
#endif
}
// Closes the group of this lane's copies since the last call; an empty group counts too.
EXL_DEVICE void cp_async_commit_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most the kPending newest groups of this lane are still pending.
template <int kPending> EXL_DEVICE void cp_async_wait_group() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" :: "n"(kPending) : "memory");
#endif
}

// ---- global memory -------------------------------------------------------------------------------------------------

// Loads of the model's weights, which no launch writes and which are not reused soon: they bypass L1 if the instruction
// can (sm_70 and up). The compiler may move them anywhere, even above griddepcontrol_wait.
#if __CUDA_ARCH__ >= 700
#define EXL_LD_NC "ld.global.nc.L1::no_allocate"
#else
#define EXL_LD_NC "ld.global.nc"
#endif
EXL_DEVICE u32 ld_global_nc_u32(const void* p) {
  u32 v;
  asm(EXL_LD_NC ".u32 %0, [%1];" : "=r"(v) : "l"(__cvta_generic_to_global(p)));
  return v;
}
EXL_DEVICE uint2 ld_global_nc_u32x2(const void* p) {
  uint2 v;
  asm(EXL_LD_NC ".v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(__cvta_generic_to_global(p)));
  return v;
}
EXL_DEVICE uint4 ld_global_nc_u32x4(const void* p) {
  uint4 v;
  asm(EXL_LD_NC ".v4.u32 {%0,%1,%2,%3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(__cvta_generic_to_global(p)));
  return v;
}
#undef EXL_LD_NC

// ---- programmatic dependent launch ---------------------------------------------------------------------------------

// Waits until the kernels that this one depends on have finished and their writes are visible. Before it, touch only what
// no earlier launch of the chain writes: weights. Pointers to anything else must not be __restrict__: a const __restrict__
// pointer is read like ld_global_nc, which the compiler may move above the wait. tests/compile/test_dependence.py checks
// the machine code. Does nothing below sm_90 or in a plain launch.
EXL_DEVICE void griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next kernel of the chain start: its blocks use multiprocessors as this kernel's blocks leave them free.
EXL_DEVICE void griddepcontrol_launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif
