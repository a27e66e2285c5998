// row_norm: normalises rows by sums that it computes itself: LayerNorm, RMSNorm of rows without sums of squares beside
// them, or no norm, where a linear reads the residual stream as it is.
//
//   x          f16, bf16 or f32 (in_type 0, 1, 2) [num_tokens, x_stride]
//   weight     f32 [K]; not read if EXL_NORM is 0
//   second_weight  f32 [second_K], or null: of a second run of channels, from channel K of x and y on, with sums of its own
//   y          f16 (saturated), bf16 or f32 (out_type) [num_tokens, y_stride], rounded once; may be x
//   channel_map i32 [K] or null: channel k is stored at channel_map[k], for a consumer under act-order; y is not x then
//
// Block: 8 warps, one row; grid: (num_tokens, 1, or 2 with a second run). Shared bytes: 64. Sizes and strides are
// multiples of 8.
// Macros: EXL_NORM 0: none, 1: RMSNorm, 2: LayerNorm without bias. Architectures: all. Tests: tests/kernels/test_norms.py
#include <exl/rows.cuh>

constexpr bool kNone = EXL_NORM == 0, kCentred = EXL_NORM == 2;

EXL_KERNEL(row_norm, 256, 2)
(const void* x, const float* __restrict__ weight, const float* __restrict__ second_weight, void* y,
 const i32* __restrict__ channel_map, int K, int second_K, int x_stride, int y_stride, int in_type, int out_type, float eps) {
  EXL_DYNAMIC_SMEM(float, s_sums);
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const bool second = blockIdx.y > 0;
  const size_t token = blockIdx.x, skipped = second ? K : 0, from = token * x_stride + skipped, to = token * y_stride + skipped;
  const float* w = second ? second_weight : weight;
  const int num_channels = second ? second_K : K;
  RowNorm norm{0.0f, 1.0f};
  if constexpr (!kNone) norm = norm_of_row<kCentred>(x, from, in_type, num_channels, eps, s_sums);
  for (int k = static_cast<int>(threadIdx.x) * 8; k < num_channels; k += kRowThreads * 8) {
    float v[8];
    load_eight(v, x, from + k, in_type);
    if constexpr (!kNone) {
      float factor[8];
      load_eight(factor, w, k, 2);
      EXL_UNROLL
      for (int i = 0; i < 8; ++i) v[i] = (v[i] - norm.mean) * norm.factor * factor[i];
    }
    store_eight(y, to, k, v, out_type, channel_map);
  }
}
