// rms_norm: normalises rows of the residual, if no linear kernel does so as it reads them.
//
//   h          f32 [num_tokens, stride]
//   sumsq      f32 [num_tokens, ceil(K / 16)], as the residual's producer left them
//   weight     f32 [K]
//   y          f16, bf16 or f32 (out_type 0, 1, 2) [num_tokens, K]: h * (1 / rms) * weight, rounded once
//   channel_map i32 [K] or null: channel k is stored at channel_map[k], for a consumer under act-order
//
// Block: 8 warps; grid: num_tokens. No shared memory. K and stride are multiples of 8.
// Macros: none. Architectures: all. Tests: tests/kernels/test_small_kernels.py
#include <exl/activations.cuh>

constexpr int kThreads = 256;

EXL_DEVICE void store_one(void* y, size_t at, float value, int out_type) {
  if (out_type == 0) static_cast<half*>(y)[at] = saturated_half(value);
  else if (out_type == 1) static_cast<bf16*>(y)[at] = __float2bfloat16_rn(value);
  else static_cast<float*>(y)[at] = value;
}

EXL_KERNEL(rms_norm, 256, 2)
(const float* h, const float* sumsq, const float* __restrict__ weight, void* y,
 const int* __restrict__ channel_map, int K, int stride, int num_tokens, int out_type, float eps) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int token = static_cast<int>(blockIdx.x), tid = static_cast<int>(threadIdx.x);
  const Input in{h, sumsq, weight, eps, K, stride, num_tokens};
  const float factor = warp_inverse_rms(in, token, tid % 32);   // computed by every warp, so no barrier is needed
  const size_t row = static_cast<size_t>(token) * K;
  for (int k = tid * 8; k < K; k += kThreads * 8) {
    float v[8];
    load_floats<kNormedInput>(v, in, token, k, factor);
    if (channel_map) {
      EXL_UNROLL
      for (int i = 0; i < 8; ++i) store_one(y, row + channel_map[k + i], v[i], out_type);
      continue;
    }
    if (out_type == 2) {
      float4* out = reinterpret_cast<float4*>(static_cast<float*>(y) + row + k);
      out[0] = make_float4(v[0], v[1], v[2], v[3]);
      out[1] = make_float4(v[4], v[5], v[6], v[7]);
      continue;
    }
    u32 pairs[4];
    EXL_UNROLL
    for (int i = 0; i < 4; ++i)
      pairs[i] = out_type == 1 ? cvt_bf16x2_f32(v[2 * i], v[2 * i + 1]) : saturated_half2(v[2 * i], v[2 * i + 1]);
    *reinterpret_cast<uint4*>(static_cast<u16*>(y) + row + k) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}
