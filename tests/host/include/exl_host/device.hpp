#pragma once
// NVRTC's built-ins for g++: vector types, intrinsics, collectives, atomics. It includes few headers, because every kernel
// variant parses it. Semantics follow the CUDA C++ Programming Guide; if that leaves freedom, the shim takes the strictest
// reading.
#include "runtime.h"

#ifndef EXL_ARCH
#error "EXL_ARCH must be given: 86 for compute capability 8.6"
#endif
#define EXL_DEVICE inline __attribute__((always_inline))
// static, so that of a file's kernels only the requested one is compiled.
#define EXL_KERNEL(name, threads, min_blocks)                                       \
  __attribute__((unused)) static constexpr u32 name##_max_threads = (threads);      \
  __attribute__((unused, noinline)) static void name
#define EXL_DYNAMIC_SMEM(T, name) T* const name = static_cast<T*>(exl_shared_memory())
#define EXL_UNROLL
#define EXL_NO_UNROLL
#define __restrict__ __restrict

// ---- vector types --------------------------------------------------------------------------------------------------

#define EXL_VECTORS(T, base, a2, a4)                                     \
  struct alignas(a2) base##2 { T x, y; };                                \
  struct base##3 { T x, y, z; };                                         \
  struct alignas(a4) base##4 { T x, y, z, w; };                          \
  EXL_DEVICE base##2 make_##base##2(T x, T y) { return {x, y}; }         \
  EXL_DEVICE base##3 make_##base##3(T x, T y, T z) { return {x, y, z}; } \
  EXL_DEVICE base##4 make_##base##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EXL_VECTORS(i8, char, 2, 4)
EXL_VECTORS(u8, uchar, 2, 4)
EXL_VECTORS(short, short, 4, 8)
EXL_VECTORS(u16, ushort, 4, 8)
EXL_VECTORS(int, int, 8, 16)
EXL_VECTORS(u32, uint, 8, 16)
EXL_VECTORS(i64, longlong, 16, 16)
EXL_VECTORS(u64, ulonglong, 16, 16)
EXL_VECTORS(float, float, 8, 16)
EXL_VECTORS(double, double, 16, 16)
#undef EXL_VECTORS

#define threadIdx (*exl_thread_idx)
#define blockIdx exl_block_idx
#define blockDim exl_block_dim
#define gridDim exl_grid_dim
constexpr int warpSize = 32;

// ---- bits and numbers ----------------------------------------------------------------------------------------------

template <class To, class From> EXL_DEVICE To exl_bit_cast(From v) {
  static_assert(sizeof(To) == sizeof(From), "sizes differ");
  return __builtin_bit_cast(To, v);
}
EXL_DEVICE float __uint_as_float(u32 v) { return exl_bit_cast<float>(v); }
EXL_DEVICE float __int_as_float(int v) { return exl_bit_cast<float>(v); }
EXL_DEVICE u32 __float_as_uint(float v) { return exl_bit_cast<u32>(v); }
EXL_DEVICE int __float_as_int(float v) { return exl_bit_cast<int>(v); }

EXL_DEVICE int __popc(u32 v) { return __builtin_popcount(v); }
EXL_DEVICE int __popcll(u64 v) { return __builtin_popcountll(v); }
EXL_DEVICE int __clz(int v) { return v ? __builtin_clz(static_cast<u32>(v)) : 32; }
EXL_DEVICE int __clzll(i64 v) { return v ? __builtin_clzll(static_cast<u64>(v)) : 64; }
EXL_DEVICE int __ffs(int v) { return __builtin_ffs(v); }
EXL_DEVICE int __ffsll(i64 v) { return __builtin_ffsll(v); }
EXL_DEVICE u32 __brev(u32 v) {
  v = ((v >> 1) & 0x55555555u) | ((v & 0x55555555u) << 1);
  v = ((v >> 2) & 0x33333333u) | ((v & 0x33333333u) << 2);
  v = ((v >> 4) & 0x0f0f0f0fu) | ((v & 0x0f0f0f0fu) << 4);
  return __builtin_bswap32(v);
}
EXL_DEVICE u32 __umulhi(u32 a, u32 b) { return static_cast<u32>((static_cast<u64>(a) * b) >> 32); }
EXL_DEVICE int __mulhi(int a, int b) { return static_cast<int>((static_cast<i64>(a) * b) >> 32); }
EXL_DEVICE u32 __funnelshift_l(u32 lo, u32 hi, u32 n) {
  return static_cast<u32>((((static_cast<u64>(hi) << 32) | lo) << (n & 31)) >> 32);
}
EXL_DEVICE u32 __funnelshift_r(u32 lo, u32 hi, u32 n) {
  return static_cast<u32>(((static_cast<u64>(hi) << 32) | lo) >> (n & 31));
}
EXL_DEVICE u32 __byte_perm(u32 a, u32 b, u32 selector) {  // prmt without its sign mode
  const u64 bytes = (static_cast<u64>(b) << 32) | a;
  u32 r = 0;
  for (u32 i = 0; i < 4; ++i) r |= static_cast<u32>((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  return r;
}
EXL_DEVICE int __dp4a(int a, int b, int c) {
  for (u32 i = 0; i < 4; ++i)
    c += static_cast<i8>(static_cast<u32>(a) >> (8 * i)) * static_cast<i8>(static_cast<u32>(b) >> (8 * i));
  return c;
}

extern "C" {
float expf(float) noexcept;
float exp2f(float) noexcept;
float exp10f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float log1pf(float) noexcept;
float expm1f(float) noexcept;
float powf(float, float) noexcept;
float sinf(float) noexcept;
float cosf(float) noexcept;
float tanhf(float) noexcept;
float erff(float) noexcept;
float sqrtf(float) noexcept;
float fabsf(float) noexcept;
float fmaf(float, float, float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float floorf(float) noexcept;
float ceilf(float) noexcept;
float rintf(float) noexcept;
float roundf(float) noexcept;
float truncf(float) noexcept;
float ldexpf(float, int) noexcept;
float copysignf(float, float) noexcept;
float fmodf(float, float) noexcept;
void sincosf(float, float*, float*) noexcept;
double sin(double) noexcept;
double cos(double) noexcept;
double exp(double) noexcept;
double pow(double, double) noexcept;
double sqrt(double) noexcept;
}
EXL_DEVICE float rsqrtf(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }
EXL_DEVICE float __expf(float x) { return expf(x); }
EXL_DEVICE float __logf(float x) { return logf(x); }
EXL_DEVICE float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
EXL_DEVICE float __fadd_rn(float a, float b) { return a + b; }
EXL_DEVICE float __fsub_rn(float a, float b) { return a - b; }
EXL_DEVICE float __fmul_rn(float a, float b) { return a * b; }
EXL_DEVICE float __fdiv_rn(float a, float b) { return a / b; }
EXL_DEVICE float __fdividef(float a, float b) { return a / b; }
EXL_DEVICE float __frcp_rn(float a) { return 1.0f / a; }
EXL_DEVICE float __fsqrt_rn(float a) { return sqrtf(a); }
EXL_DEVICE float __saturatef(float a) { return a > 0.0f ? (a < 1.0f ? a : 1.0f) : 0.0f; }  // NaN becomes 0
EXL_DEVICE bool isnan(float x) { return __builtin_isnan(x); }
EXL_DEVICE bool isinf(float x) { return __builtin_isinf(x); }
EXL_DEVICE int exl_to_int(float x) {  // cvt.s32.f32 saturates, NaN becomes 0
  return __builtin_isnan(x)   ? 0
         : x >= 2147483648.0f ? 2147483647
         : x < -2147483648.0f ? -2147483647 - 1
                              : static_cast<int>(x);
}
EXL_DEVICE int __float2int_rn(float x) { return exl_to_int(rintf(x)); }
EXL_DEVICE int __float2int_rz(float x) { return exl_to_int(truncf(x)); }
EXL_DEVICE int __float2int_rd(float x) { return exl_to_int(floorf(x)); }
EXL_DEVICE int __float2int_ru(float x) { return exl_to_int(ceilf(x)); }
EXL_DEVICE float __int2float_rn(int x) { return static_cast<float>(x); }
EXL_DEVICE float __uint2float_rn(u32 x) { return static_cast<float>(x); }

template <class T> EXL_DEVICE T min(T a, T b) { return b < a ? b : a; }
template <class T> EXL_DEVICE T max(T a, T b) { return a < b ? b : a; }
template <> EXL_DEVICE float min(float a, float b) { return fminf(a, b); }  // returns the operand that is not NaN
template <> EXL_DEVICE float max(float a, float b) { return fmaxf(a, b); }
template <class T> EXL_DEVICE T abs(T a) { return a < 0 ? -a : a; }
template <> EXL_DEVICE float abs(float a) { return fabsf(a); }

// ---- barriers, fences, warps ---------------------------------------------------------------------------------------

EXL_DEVICE void __syncthreads() { exl_syncthreads(); }
EXL_DEVICE int __syncthreads_count(int p) { return exl_syncthreads_vote(p, 0); }
EXL_DEVICE int __syncthreads_and(int p) { return exl_syncthreads_vote(p, 1); }
EXL_DEVICE int __syncthreads_or(int p) { return exl_syncthreads_vote(p, 2); }
EXL_DEVICE void __syncwarp(u32 mask = ~0u) { exl_syncwarp(mask); }
EXL_DEVICE void __threadfence() {}
EXL_DEVICE void __threadfence_block() {}
EXL_DEVICE void __threadfence_system() {}
EXL_DEVICE void __nanosleep(u32) {}
EXL_DEVICE void __trap() { exl_trap("__trap"); }

template <class T> EXL_DEVICE u64 exl_pack(T v) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles and matches move 4 or 8 bytes");
  if constexpr (sizeof(T) == 4) return exl_bit_cast<u32>(v);
  else return exl_bit_cast<u64>(v);
}
template <class T> EXL_DEVICE T exl_unpack(u64 v) {
  if constexpr (sizeof(T) == 4) return exl_bit_cast<T>(static_cast<u32>(v));
  else return exl_bit_cast<T>(v);
}
template <class T> EXL_DEVICE T __shfl_sync(u32 mask, T v, int lane, int width = 32) {
  return exl_unpack<T>(exl_shuffle(mask, exl_pack(v), 0, static_cast<u32>(lane), width));
}
template <class T> EXL_DEVICE T __shfl_up_sync(u32 mask, T v, u32 delta, int width = 32) {
  return exl_unpack<T>(exl_shuffle(mask, exl_pack(v), 1, delta, width));
}
template <class T> EXL_DEVICE T __shfl_down_sync(u32 mask, T v, u32 delta, int width = 32) {
  return exl_unpack<T>(exl_shuffle(mask, exl_pack(v), 2, delta, width));
}
template <class T> EXL_DEVICE T __shfl_xor_sync(u32 mask, T v, int lanes, int width = 32) {
  return exl_unpack<T>(exl_shuffle(mask, exl_pack(v), 3, static_cast<u32>(lanes), width));
}
EXL_DEVICE u32 __ballot_sync(u32 mask, int p) { return exl_vote(mask, p, 0); }
EXL_DEVICE int __all_sync(u32 mask, int p) { return static_cast<int>(exl_vote(mask, p, 1)); }
EXL_DEVICE int __any_sync(u32 mask, int p) { return static_cast<int>(exl_vote(mask, p, 2)); }
EXL_DEVICE u32 __activemask() { return exl_activemask(); }
template <class T> EXL_DEVICE u32 __match_any_sync(u32 mask, T v) { return exl_match(mask, exl_pack(v), 0, nullptr); }
template <class T> EXL_DEVICE u32 __match_all_sync(u32 mask, T v, int* p) { return exl_match(mask, exl_pack(v), 1, p); }
#if EXL_ARCH >= 80
EXL_DEVICE u32 __reduce_add_sync(u32 mask, u32 v) { return exl_reduce(mask, v, 0); }
EXL_DEVICE int __reduce_add_sync(u32 mask, int v) { return static_cast<int>(exl_reduce(mask, static_cast<u32>(v), 0)); }
EXL_DEVICE u32 __reduce_min_sync(u32 mask, u32 v) { return exl_reduce(mask, v, 1); }
EXL_DEVICE u32 __reduce_max_sync(u32 mask, u32 v) { return exl_reduce(mask, v, 2); }
EXL_DEVICE int __reduce_min_sync(u32 mask, int v) { return static_cast<int>(exl_reduce(mask, static_cast<u32>(v), 3)); }
EXL_DEVICE int __reduce_max_sync(u32 mask, int v) { return static_cast<int>(exl_reduce(mask, static_cast<u32>(v), 4)); }
EXL_DEVICE u32 __reduce_and_sync(u32 mask, u32 v) { return exl_reduce(mask, v, 5); }
EXL_DEVICE u32 __reduce_or_sync(u32 mask, u32 v) { return exl_reduce(mask, v, 6); }
EXL_DEVICE u32 __reduce_xor_sync(u32 mask, u32 v) { return exl_reduce(mask, v, 7); }
#endif

// ---- memory --------------------------------------------------------------------------------------------------------

template <class T> EXL_DEVICE T __ldg(const T* p) { return *p; }
template <class T> EXL_DEVICE T __ldcg(const T* p) { return *p; }
template <class T> EXL_DEVICE T __ldcs(const T* p) { return *p; }
template <class T> EXL_DEVICE T __ldcv(const T* p) { return *p; }
template <class T> EXL_DEVICE void __stcs(T* p, T v) { *p = v; }
template <class T> EXL_DEVICE void __stcg(T* p, T v) { *p = v; }

// Integers only: floating-point atomics add in an order that changes from run to run.
template <class T> EXL_DEVICE T exl_atomic_op(T* p, T v, T compare, int kind) {
  static_assert((sizeof(T) == 4 || sizeof(T) == 8) && T(1) / T(2) == T(0), "atomics take 32- and 64-bit integers");
  return exl_unpack<T>(exl_atomic(p, exl_pack(v), exl_pack(compare), sizeof(T), kind));
}
#define EXL_ATOMIC(name, kind_signed, kind_unsigned)                                    \
  EXL_DEVICE int name(int* p, int v) { return exl_atomic_op(p, v, 0, kind_signed); }    \
  EXL_DEVICE u32 name(u32* p, u32 v) { return exl_atomic_op(p, v, 0u, kind_unsigned); } \
  EXL_DEVICE u64 name(u64* p, u64 v) { return exl_atomic_op(p, v, u64(0), kind_unsigned); }
EXL_ATOMIC(atomicAdd, 0, 0)
EXL_ATOMIC(atomicExch, 1, 1)
EXL_ATOMIC(atomicMin, 2, 3)
EXL_ATOMIC(atomicMax, 4, 5)
EXL_ATOMIC(atomicAnd, 6, 6)
EXL_ATOMIC(atomicOr, 7, 7)
EXL_ATOMIC(atomicXor, 8, 8)
#undef EXL_ATOMIC
EXL_DEVICE u32 atomicInc(u32* p, u32 limit) { return exl_atomic_op(p, limit, 0u, 9); }
EXL_DEVICE u32 atomicDec(u32* p, u32 limit) { return exl_atomic_op(p, limit, 0u, 10); }
EXL_DEVICE int atomicSub(int* p, int v) {
  return static_cast<int>(exl_atomic_op(reinterpret_cast<u32*>(p), 0u - static_cast<u32>(v), 0u, 0));
}
EXL_DEVICE u32 atomicSub(u32* p, u32 v) { return exl_atomic_op(p, 0u - v, 0u, 0); }
EXL_DEVICE int atomicCAS(int* p, int compare, int v) { return exl_atomic_op(p, v, compare, 11); }
EXL_DEVICE u32 atomicCAS(u32* p, u32 compare, u32 v) { return exl_atomic_op(p, v, compare, 11); }
EXL_DEVICE u64 atomicCAS(u64* p, u64 compare, u64 v) { return exl_atomic_op(p, v, compare, 11); }

// The compiler does not instrument library copies, so report their accesses.
EXL_DEVICE void* exl_memcpy(void* dst, const void* src, size_t n) {
  exl_access(src, n, 0);
  exl_access(dst, n, 1);
  return __builtin_memcpy(dst, src, n);
}
EXL_DEVICE void* exl_memset(void* dst, int v, size_t n) {
  exl_access(dst, n, 1);
  return __builtin_memset(dst, v, n);
}
#define memcpy exl_memcpy
#define memset exl_memset
