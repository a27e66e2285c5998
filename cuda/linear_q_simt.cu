// linear_q_simt: y = x W^T (+ bias) in f32 arithmetic, for exactly EXL_TOKENS tokens, on GPUs without tensor cores (sm_60
// to sm_72): the same weights, slices of K and epilogues as linear_q.cu. It does no f16 arithmetic, which sm_61 runs at 1/64
// of the f32 rate.
//
//   codes, qparams, group_units                      as in linear_q.cu
//   x, sumsq, norm, eps                              activations.cuh; `input` names the kind; never rounded to f16
//   y, bias, sumsq_out, permuted, channel_map, scale   epilogue.cuh; `epilogue` and `out_type` name the kind
//
// Block: 8 warps, warp s takes slice s of K for the same 16 rows; grid: tiles. A lane multiplies its own codes of rows g
// and g + 8; the four lanes of a quad add their sums at the end of the slice. Weights are loaded one stage ahead, into
// registers.
// Shared bytes: max(8 * num_tokens * x_stages * kStageK * 4, 4096); see exl/kernels/linear_simt.py.
// Macros: tile.cuh; EXL_TOKENS 1|2|4; EXL_R 1 and EXL_STAGES 2 for linear_core.cuh.
// Tests: tests/kernels/test_linear_simt.py
#include <exl/activations.cuh>
#include <exl/epilogue.cuh>
#include <exl/linear_core.cuh>

constexpr int kTokens = EXL_TOKENS;

// Code of element `second` (0, 1) of pair p of mma j, from a lane's words of 64 inputs; the table is in exl/layout/tiles.py.
EXL_DEVICE u32 code_of(const u32* w, int j, int p, int second) {
  if (kBits == 4) return w[j % kBits] >> (4 * p + 16 * second) & 15u;
  if (kBits == 8) return w[(2 * j + p / 2) % kBits] >> (16 * (p % 2) + 8 * second) & 255u;
  if (kBits == 2) return w[j / 2 % kBits] >> (8 * (j % 2) + 2 * p + 16 * second) & 3u;
  const int q = 4 * j + p;
  if (q < 15) return w[q / 5 % kBits] >> (3 * (q % 5) + 16 * second) & 7u;
  const int bit = 15 + 16 * second;
  return (w[0] >> bit & 1u) | (w[1 % kBits] >> bit & 1u) << 1 | (w[2 % kBits] >> bit & 1u) << 2;
}

// v + 2^23 as a float, exact: code and zero are subtracted in this form, also exactly, without an integer conversion.
EXL_DEVICE float biased(u32 v) { return __uint_as_float(0x4b000000u | v); }
EXL_DEVICE float biased_zero(u32 packed, int high) { return biased(packed >> (high * kBits) & ((1u << kBits) - 1u)); }

// Copies channels [k0, k0 + num_k) of every token to s_x [num_tokens][pitch] in f32. Lane i holds the factor of token i.
template <int kKind> EXL_DEVICE void stage_slice(float* s_x, int pitch, const Input& in, int k0, int num_k, float factor, int lane) {
  for (int token = 0; token < in.num_tokens; ++token) {
    const float f = kKind == kNormedInput ? __shfl_sync(kAllLanes, factor, token) : 1.0f;
    for (int chunk = lane; chunk < num_k / 8; chunk += 32) {
      const int k = k0 + chunk * 8;
      float v[8] = {};   // zeros beyond K, where the codes are padding
      if (k < in.K) load_floats<kKind>(v, in, token, k, f);
      float4* to = reinterpret_cast<float4*>(s_x + token * pitch + chunk * 8);
      to[0] = make_float4(v[0], v[1], v[2], v[3]);
      to[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
  }
}

// Adds one stage to acc[token][0: row g, 1: row g + 8]. x: the lane's inputs of token 0, from input 8t of the stage on.
EXL_DEVICE void multiply_stage_simt(float (&acc)[kTokens][2], const u32 (&codes)[kLoads * 4], const QParams& qparams, const float* x, int pitch) {
  float part[kTokens][2] = {}, zero[2] = {};
  EXL_UNROLL
  for (int b = 0; b < kStageK / 32; ++b) {   // 32 inputs, of which this lane has 8
    const int unit = b * 32 / kUnitK;
    if (b * 32 % kUnitK == 0) {
      const u32 packed = qparams.packed_zeros(unit);
      zero[0] = biased_zero(packed, 0);
      zero[1] = biased_zero(packed, 1);
      EXL_UNROLL
      for (int i = 0; i < kTokens; ++i) part[i][0] = part[i][1] = 0.0f;
    }
    EXL_UNROLL
    for (int half_k = 0; half_k < 2; ++half_k) {   // the lane's 4 inputs of one mma
      float4 in[kTokens];
      EXL_UNROLL
      for (int i = 0; i < kTokens; ++i) in[i] = *reinterpret_cast<const float4*>(x + i * pitch + b * 32 + half_k * 4);
      EXL_UNROLL
      for (int high = 0; high < 2; ++high) {
        float w[4];
        EXL_UNROLL
        for (int e = 0; e < 4; ++e)
          w[e] = biased(code_of(codes + b / 2 * kBits, b % 2 * 2 + half_k, high + 2 * (e / 2), e % 2)) - zero[high];
        EXL_UNROLL
        for (int i = 0; i < kTokens; ++i)
          part[i][high] = fmaf(w[3], in[i].w, fmaf(w[2], in[i].z, fmaf(w[1], in[i].y, fmaf(w[0], in[i].x, part[i][high]))));
      }
    }
    if ((b + 1) * 32 % kUnitK == 0) {
      const float2 scale = qparams.scale(unit);
      EXL_UNROLL
      for (int i = 0; i < kTokens; ++i) {
        acc[i][0] = fmaf(scale.x, part[i][0], acc[i][0]);
        acc[i][1] = fmaf(scale.y, part[i][1], acc[i][1]);
      }
    }
  }
}

EXL_KERNEL(linear_q_simt, 256, 1)
(const u32* __restrict__ codes, const u8* __restrict__ qparams, const float* __restrict__ bias, const void* __restrict__ x,
 const float* __restrict__ sumsq, const float* __restrict__ norm, void* y, float* sumsq_out, float* permuted, const i32* __restrict__ channel_map, int K,
 int N, int num_tiles, int num_blocks, int group_units, int num_tokens, int input, int x_stride, int x_stages,
 int epilogue, int out_type, int y_stride, float eps, float scale) {
  EXL_DYNAMIC_SMEM(u8, smem);   // [8 warps][num_tokens][x_stages * kStageK] activations
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, t = lane % 4;
  const int num_stages = (K + kStageK - 1) / kStageK, tile = static_cast<int>(blockIdx.x);
  const int first = slice_start(warp, num_stages), last = slice_start(warp + 1, num_stages);

  Weights weights;
  weights.start(smem, warp, lane, {codes, qparams, num_tiles, num_stages, num_blocks, group_units}, tile, first, last);

  const Input in{x, sumsq, norm, eps, K, x_stride, num_tokens};
  float factor = 1.0f;
  if (input == kNormedInput) {
    for (int token = 0; token < num_tokens; ++token) {
      const float r = warp_inverse_rms(in, token, lane);
      if (lane == token) factor = r;
    }
  }
  const int pitch = x_stages * kStageK;
  float* s_x = reinterpret_cast<float*>(smem) + warp * num_tokens * pitch;
  float acc[kTokens][2] = {};
  for (int chunk = first; chunk < last; chunk += x_stages) {
    const int stop = chunk + x_stages < last ? chunk + x_stages : last;
    const int k0 = chunk * kStageK, num_k = (stop - chunk) * kStageK;
    __syncwarp();          // all lanes have read the previous chunk
    if (input == kHalfInput) stage_slice<kHalfInput>(s_x, pitch, in, k0, num_k, factor, lane);
    else if (input == kBfloatInput) stage_slice<kBfloatInput>(s_x, pitch, in, k0, num_k, factor, lane);
    else stage_slice<kNormedInput>(s_x, pitch, in, k0, num_k, factor, lane);
    __syncwarp();
    for (int stage = chunk; stage < stop; ++stage) {
      u32 r_codes[1][kLoads * 4];
      QParams qparams_now[1];
      weights.ring.take(r_codes, qparams_now, 0);
      weights.ring.fetch(0, 0);
      weights.ring.advance(1);
      multiply_stage_simt(acc, r_codes[0], qparams_now[0], s_x + (stage - chunk) * kStageK + 8 * t, pitch);
    }
  }
  EXL_UNROLL
  for (int i = 0; i < kTokens; ++i) {
    EXL_UNROLL
    for (int high = 0; high < 2; ++high) {
      acc[i][high] += __shfl_xor_sync(kAllLanes, acc[i][high], 1);
      acc[i][high] += __shfl_xor_sync(kAllLanes, acc[i][high], 2);
    }
  }
  float4 mine = make_float4(0.0f, 0.0f, 0.0f, 0.0f);   // in the layout of an mma's result: rows g, g + 8, tokens 2t, 2t + 1
  EXL_UNROLL
  for (int i = 0; i < kTokens; ++i) {
    if (i == 2 * t) { mine.x = acc[i][0]; mine.z = acc[i][1]; }
    if (i == 2 * t + 1) { mine.y = acc[i][0]; mine.w = acc[i][1]; }
  }
  __syncthreads();         // the activations' bytes are reused for the slices' sums
  float4* s_sum = reinterpret_cast<float4*>(smem);
  s_sum[warp * 32 + lane] = mine;
  __syncthreads();
  if (warp > 0) return;
  float4 v[kSlices];
  EXL_UNROLL
  for (int s = 0; s < kSlices; ++s) v[s] = s_sum[s * 32 + lane];
  const float4 root = tree_sum(v);
  float sum[4] = {root.x, root.y, root.z, root.w};
  const Output out{y, bias, sumsq_out, permuted, channel_map, epilogue, out_type, N, num_tokens, y_stride, scale};
  finish_tile(sum, out, tile, num_tiles, 0, lane);
}
