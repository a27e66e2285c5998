// norm_add: h += scale * norm(y): a block's output y, normalised, joins the residual stream.
//
//   y          f32 [num_tokens, y_stride]
//   weight     f32 [C]
//   h          f32 [num_tokens, h_stride], read and written
//   sumsq      f32 [num_tokens, ceil(C / 16)]: sums of squares of 16 channels of the new h each, in the order of epilogue.cuh
//   EXL_CENTRED  0: RMSNorm; 1: LayerNorm without bias
//
// Block: 8 warps, one row; grid: num_tokens. Shared bytes: 64. C and the strides are multiples of 8.
// Macros: EXL_CENTRED. Architectures: all. Tests: tests/kernels/test_norms.py
#include <exl/rows.cuh>

EXL_KERNEL(norm_add, 256, 2)
(const float* y, const float* __restrict__ weight, float* h, float* sumsq, int C, int y_stride, int h_stride, float eps,
 float scale) {
  EXL_DYNAMIC_SMEM(float, s_sums);
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int tid = static_cast<int>(threadIdx.x), num_tiles = (C + 15) / 16;
  const size_t token = blockIdx.x, from = token * y_stride, to = token * h_stride;
  const RowNorm norm = norm_of_row<EXL_CENTRED>(y, from, 2, C, eps, s_sums);
  for (int base = 0; base < C; base += kRowThreads * 8) {
    const int k = base + tid * 8;
    float sum[8] = {}, square[8];
    if (k < C) {
      float v[8], w[8], old[8];
      load_eight(v, y, from + k, 2);
      load_eight(w, weight, k, 2);
      load_eight(old, h, to + k, 2);
      EXL_UNROLL
      for (int i = 0; i < 8; ++i) sum[i] = fmaf(scale, (v[i] - norm.mean) * norm.factor * w[i], old[i]);
      store_eight(h, to, k, sum, 2, nullptr);
    }
    EXL_UNROLL
    for (int i = 0; i < 8; ++i) {   // two neighbours share a tile; all lanes take part, also those beyond the last channel
      const float next = __shfl_down_sync(0xffffffffu, sum[i], 1);
      square[i] = fmaf(next, next, sum[i] * sum[i]);
    }
    if (k < C && k % 16 == 0) sumsq[token * num_tiles + k / 16] = tree_sum(square);
  }
}
