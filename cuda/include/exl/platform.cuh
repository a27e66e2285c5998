#pragma once
// The only file that depends on the compiler. NVRTC compiles for the GPU; with EXL_HOST defined, g++ compiles the same
// sources against the test shim, where every lane is a fiber. Kernels use the names below for both.
//
//   EXL_ARCH                              compute capability: 86 for 8.6
//   EXL_DEVICE                            before a function that kernels call; always inlined
//   EXL_KERNEL(name, threads, min_blocks) before a kernel's parameter list; a block has at most `threads` threads
//   EXL_DYNAMIC_SMEM(T, name)             T* name = the block's shared memory, aligned to 16 bytes. Static shared memory
//                                         is not used, so that all bytes are planned in one place
//   EXL_UNROLL                            before a loop that must be unrolled: its body indexes registers
//   EXL_NO_UNROLL                         before a loop that must not be unrolled: it would take too many registers
//   u8 u16 u32 u64, i8 i32 i64            NVRTC has no <cstdint>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i8 = signed char;
using i32 = int;
using i64 = long long;

#if defined(EXL_HOST)
#include <exl_host/device.hpp>
#else
#define EXL_ARCH (__CUDA_ARCH__ / 10)
#define EXL_DEVICE __device__ __forceinline__
#define EXL_KERNEL(name, threads, min_blocks) extern "C" __global__ void __launch_bounds__(threads, min_blocks) name
#define EXL_DYNAMIC_SMEM(T, name)                               \
  extern __shared__ __align__(16) unsigned char exl_smem_raw[]; \
  T* const name = reinterpret_cast<T*>(exl_smem_raw)
#define EXL_UNROLL _Pragma("unroll")
#define EXL_NO_UNROLL _Pragma("unroll 1")
#endif
