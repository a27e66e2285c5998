// Calls every wrapper of ptx.cuh and half.cuh once. Tests: tests/compile/test_nvrtc.py compiles it for every architecture,
// tests/compile/test_ptx_text.py evaluates the scalar ones from their PTX, tests/kernels/test_shim_instructions.py runs
// the collective ones.
#include <exl/half.cuh>

// Scalar wrappers: in u32 [n][3], out u32 [n][kScalars]; results of 16 bits fill the low half.
constexpr int kScalars = 19;
EXL_KERNEL(scalar_instructions, 32, 1)(const u32* in, u32* out) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  const u32 a = in[3 * i], b = in[3 * i + 1], c = in[3 * i + 2];
  const u16 h = static_cast<u16>(a);
  u32* r = out + kScalars * i;
  r[0] = lop3<0xea>(a, b, c);
  r[1] = lop3<0x96>(a, b, c);
  r[2] = lop3<0x1b>(a, b, c);
  r[3] = prmt(a, b, c);
  r[4] = prmt(a, 0x64646464u, 0x4140u);
  r[5] = add_f16x2(a, b);
  r[6] = sub_f16x2(a, b);
  r[7] = mul_f16x2(a, b);
  r[8] = fma_f16x2(a, b, c);
  r[9] = __float_as_uint(cvt_f32_f16(h));
  r[10] = cvt_f16_f32(__uint_as_float(a));
  r[11] = cvt_f16x2_f32(__uint_as_float(a), __uint_as_float(b));
  r[12] = __float_as_uint(cvt_f32_bf16(h));
  r[13] = cvt_bf16_f32(__uint_as_float(a));
  r[14] = cvt_bf16x2_f32(__uint_as_float(a), __uint_as_float(b));
  r[15] = half2_bits(__floats2half2_rn(__uint_as_float(b), __uint_as_float(c)));
  r[16] = half2_bits(__hfma2(bits_half2(a), bits_half2(b), bits_half2(c)));
  r[17] = __float_as_uint(ex2_approx(__uint_as_float(a)));
  r[18] = finite_f16x2(a);
}

// The other wrappers, only to be compiled.
EXL_KERNEL(every_instruction, 32, 1)(const u32* in, u32* out, float* sums) {
  EXL_DYNAMIC_SMEM(uint4, buffer);
  const int i = threadIdx.x;
  cp_async_16(buffer + i, in + 4 * i);
  cp_async_16(buffer + 32 + i, in + 4 * i, 5);
  cp_async_8(buffer + 64 + i, in + 4 * i);
  cp_async_4(buffer + 96 + i, in + 4 * i, 2);
  cp_async_commit_group();
  cp_async_wait_group<0>();
  __syncwarp();
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  u32 v = ld_global_nc_u32(in + i) ^ ld_global_nc_u32x2(in + 2 * i).y ^ ld_global_nc_u32x4(in + 4 * i).w;
  v ^= lop3<0xea>(v, in[0], in[1]) ^ prmt(v, in[2], in[3]);
  v ^= fma_f16x2(add_f16x2(v, 1), sub_f16x2(v, 2), mul_f16x2(v, 3));
  v ^= cvt_f16x2_f32(cvt_f32_f16(static_cast<u16>(v)), cvt_f32_bf16(static_cast<u16>(v >> 16)));
  v ^= cvt_bf16x2_f32(ex2_approx(__uint_as_float(v)), 1.0f);
  v ^= cvt_bf16_f32(__uint_as_float(v)) ^ cvt_f16_f32(__uint_as_float(v));
  FragC d{};
  if constexpr (kHasMma) {
    const uint4 a4 = ldmatrix_x4(buffer + i), t4 = ldmatrix_x4_trans(buffer + i);
    const uint2 b2 = ldmatrix_x2(buffer + i % 16), t2 = ldmatrix_x2_trans(buffer + i % 16);
    const FragA a{{a4.x, a4.y, a4.z ^ t4.x, a4.w ^ t4.y}};
    const FragB b{{b2.x ^ t4.z, b2.y ^ t2.x}};
    mma_m16n8k16(d, a, b);
    mma_m16n8k8(d, a.r[0], a.r[1], b.r[0]);
    if constexpr (kHasBf16Mma) mma_m16n8k16_bf16(d, a, b);
    v ^= ldmatrix_x1(buffer + i % 8) ^ ldmatrix_x1_trans(buffer + i % 8) ^ movmatrix_trans(t2.y ^ t4.w);
  }
  out[i] = v ^ buffer[i].x ^ buffer[32 + i].y ^ buffer[64 + i].x ^ buffer[96 + i].x;
  for (int e = 0; e < 4; ++e) sums[4 * i + e] = d.r[e];
}
