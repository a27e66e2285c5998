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
#include <exl/rows.cuh>

EXL_KERNEL(rms_norm, 256, 2)
(const float* h, const float* sumsq, const float* __restrict__ weight, void* y,
 const int* __restrict__ channel_map, int K, int stride, int num_tokens, int out_type, float eps) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int token = static_cast<int>(blockIdx.x), tid = static_cast<int>(threadIdx.x);
  const Input in{h, sumsq, weight, eps, K, stride, num_tokens};
  const float factor = warp_inverse_rms(in, token, tid % 32);   // computed by every warp, so no barrier is needed
  const size_t row = static_cast<size_t>(token) * K;
  for (int k = tid * 8; k < K; k += kRowThreads * 8) {
    float v[8];
    load_floats<kNormedInput>(v, in, token, k, factor);
    store_eight(y, row, k, v, out_type, channel_map);
  }
}
