// round_activations: rounds activations to f16 for linear_q_wide.cu with the arithmetic of linear_q.cu's own prologue, so
// that both kernels give the same bits per row.
//
//   x, sumsq, norm, eps   activations.cuh; `input` names the kind (bf16 or normalised f32)
//   y                     f16 [num_tokens, K]
//   y_scale               f32 [num_tokens, 8]; bf16 only: the later factor of a token's sum over each slice
//
// Block: 8 warps, one slice of K each; grid: num_tokens. No shared memory.
// Macros: EXL_STAGE_K 128|256: inputs per stage; slices are whole stages. Architectures: all.
// Tests: tests/kernels/test_linear.py
#include <exl/activations.cuh>
#include <exl/slices.cuh>

constexpr int kStageK = EXL_STAGE_K;

EXL_KERNEL(round_activations, 256, 2)
(const void* x, const float* sumsq, const float* __restrict__ norm, half* y, float* y_scale,
 int K, int num_tokens, int input, int x_stride, float eps) {
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int lane = static_cast<int>(threadIdx.x) % 32, slice = static_cast<int>(threadIdx.x) / 32;
  const int token = static_cast<int>(blockIdx.x), num_stages = (K + kStageK - 1) / kStageK;
  const int start = slice_start(slice, num_stages) * kStageK, end = slice_start(slice + 1, num_stages) * kStageK;
  const int stop = end < K ? end : K;
  const Input in{x, sumsq, norm, eps, K, x_stride, num_tokens};
  uint4* out = reinterpret_cast<uint4*>(y + static_cast<size_t>(token) * K);
  if (input == kBfloatInput) {
    const u32 m = warp_max_magnitude(in, token, start, stop, lane);
    const float factor = into_range(m);
    if (lane == 0) y_scale[token * kSlices + slice] = out_of_range(m);
    for (int k = start + lane * 8; k < stop; k += 256) out[k / 8] = load_inputs<kBfloatInput>(in, token, k, factor);
  } else {
    const float factor = warp_inverse_rms(in, token, lane);
    for (int k = start + lane * 8; k < stop; k += 256) out[k / 8] = load_inputs<kNormedInput>(in, token, k, factor);
  }
}
