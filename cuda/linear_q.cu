// linear_q: y = x W^T (+ bias) for up to 8 tokens on tensor cores (sm_75 and up), W [outputs, K] quantized to 2, 3, 4 or
// 8 bits, in 16-row tiles (exl/layout/tiles.py).
//
//   codes       u32 [tiles][stages][planes][32 lanes][4]      tiles = ceil(rows / 16), stages = ceil(K / kStageK)
//   qparams     u8 [tiles][num_blocks][kBlockBytes]           scales and zero points: tile.cuh
//   group_units group size / 128; used only if EXL_GROUP is 0
//   x, sumsq, norm, eps                                       activations.cuh; `input` names the kind
//   y, bias, sumsq_out, permuted, channel_map, scale          epilogue.cuh; `epilogue` and `out_type` name the kind
//
// Block: 8 warps, warp s takes slice s of K for the same kR row tiles; grid: ceil(tiles / kR). Each warp has its own ring of
// weights and its own copy of the activations, of real tokens only: a chunk of `x_stages` stages of its slice at a time.
// x_stages is the whole slice or a multiple of kStages, so that each chunk starts at slot 0. There is no block barrier
// until the slices are done; they are added in a balanced tree (slices.cuh). Shared bytes:
// max(8 rings + 8 * num_tokens * x_stages * kStageK * 2, kR * 4096); see exl/layout/linear_config.py.
//
// Macros: linear_core.cuh; EXL_MIN_BLOCKS: blocks per multiprocessor that the registers must leave room for.
// Tests: tests/kernels/test_linear.py
#include <exl/activations.cuh>
#include <exl/epilogue.cuh>
#include <exl/linear_core.cuh>
#include <exl/swizzle.cuh>

constexpr int kWarps = 8;

// Copies channels [k0, k0 + num_k) of every token to s_x [num_tokens][pitch]. Lane i holds the factor of token i.
template <int kKind> EXL_DEVICE void stage_slice(half* s_x, int pitch, const Input& in, int k0, int num_k, float factor, int lane) {
  for (int token = 0; token < in.num_tokens; ++token) {
    const float f = kKind == kHalfInput ? 0.0f : __shfl_sync(kAllLanes, factor, token);
    for (int chunk = lane; chunk < num_k / 8; chunk += 32) {
      const int k = k0 + chunk * 8;
      uint4 v = make_uint4(0, 0, 0, 0);   // zeros beyond K, where the codes are padding
      if (k < in.K) v = load_inputs<kKind>(in, token, k, f);
      *reinterpret_cast<uint4*>(s_x + token * pitch + swizzled_chunk(chunk, token) * 8) = v;
    }
  }
}

EXL_KERNEL(linear_q, 256, EXL_MIN_BLOCKS)
(const u32* __restrict__ codes, const u8* __restrict__ qparams, const float* __restrict__ bias, const void* x,
 const float* sumsq, const float* __restrict__ norm, void* y, float* sumsq_out, float* permuted, const i32* __restrict__ channel_map, int K,
 int N, int num_tiles, int num_blocks, int group_units, int num_tokens, int input, int x_stride, int x_stages,
 int epilogue, int out_type, int y_stride, float eps, float scale) {
  EXL_DYNAMIC_SMEM(u8, smem);   // [8 warps] ring, then [8 warps][num_tokens][x_stages * kStageK] activations
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0), g = lane / 4, t = lane % 4;
  const int num_stages = (K + kStageK - 1) / kStageK;
  const int first = slice_start(warp, num_stages), last = slice_start(warp + 1, num_stages);
  const int tile0 = static_cast<int>(blockIdx.x) * kR;

  Weights weights;
  weights.start(smem, warp, lane, {codes, qparams, num_tiles, num_stages, num_blocks, group_units}, tile0, first, last);
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();   // only after this may results of earlier kernels be read

  const Input in{x, sumsq, norm, eps, K, x_stride, num_tokens};
  u32 largest = 0;         // bf16: bits of the largest input of token `lane` in this slice
  float factor = 0.0f;     // factor of token `lane`'s activations
  if (input != kHalfInput) {
    for (int token = 0; token < num_tokens; ++token) {
      if (input == kBfloatInput) {
        const u32 m = warp_max_magnitude(in, token, first * kStageK, last * kStageK < K ? last * kStageK : K, lane);
        if (lane == token) { largest = m; factor = into_range(m); }
      } else {
        const float r = warp_inverse_rms(in, token, lane);
        if (lane == token) factor = r;
      }
    }
  }

  const int pitch = x_stages * kStageK, row = g < num_tokens ? g : num_tokens - 1;   // past the end: the last token, whose result is not stored
  half* s_x = reinterpret_cast<half*>(smem + kWarps * Ring::kWarpBytes) + warp * num_tokens * pitch;
  const half* x0 = s_x + row * pitch + swizzled_chunk(t, row) * 8;
  const half* x1 = s_x + row * pitch + swizzled_chunk(4 + t, row) * 8;
  float acc[kR][1][4] = {};
  for (int chunk = first; chunk < last; chunk += x_stages) {
    const int stop = chunk + x_stages < last ? chunk + x_stages : last;
    const int k0 = chunk * kStageK, num_k = (stop - chunk) * kStageK;
    __syncwarp();          // all lanes have read the previous chunk
    if (input == kHalfInput) stage_slice<kHalfInput>(s_x, pitch, in, k0, num_k, factor, lane);
    else if (input == kBfloatInput) stage_slice<kBfloatInput>(s_x, pitch, in, k0, num_k, factor, lane);
    else stage_slice<kNormedInput>(s_x, pitch, in, k0, num_k, factor, lane);
    __syncwarp();
    weights.multiply<1>(acc, chunk, stop, x0, x1, 0, kStageK);
  }
  if (input == kBfloatInput) {
    const float even = out_of_range(__shfl_sync(kAllLanes, largest, 2 * t)), odd = out_of_range(__shfl_sync(kAllLanes, largest, 2 * t + 1));
    EXL_UNROLL
    for (int r = 0; r < kR; ++r) { acc[r][0][0] *= even; acc[r][0][1] *= odd; acc[r][0][2] *= even; acc[r][0][3] *= odd; }
  }

  __syncthreads();         // the rings' bytes are reused for the slices' sums
  float4* s_sum = reinterpret_cast<float4*>(smem);
  EXL_UNROLL
  for (int r = 0; r < kR; ++r)
    s_sum[(warp * kR + r) * 32 + lane] = make_float4(acc[r][0][0], acc[r][0][1], acc[r][0][2], acc[r][0][3]);
  __syncthreads();
  if (warp >= kR || tile0 + warp >= num_tiles) return;
  float4 v[kSlices];
  EXL_UNROLL
  for (int s = 0; s < kSlices; ++s) v[s] = s_sum[(s * kR + warp) * 32 + lane];
  const float4 root = tree_sum(v);
  float sum[4] = {root.x, root.y, root.z, root.w};
  const Output out{y, bias, sumsq_out, permuted, channel_map, epilogue, out_type, N, num_tokens, y_stride, scale};
  finish_tile(sum, out, tile0 + warp, num_tiles, 0, lane);
}
