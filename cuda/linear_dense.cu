// linear_dense: y = x W^T (+ bias) for up to 8 EXL_NT tokens: for the head and for layers that are not quantized. W is f16
// or bf16 in the checkpoint's own layout, [outputs, K]. Slices of K as in linear_q.cu.
//
//   w          f16 or bf16 (EXL_BF16) [rows, w_stride]; w_stride and K are multiples of 8. Of every 32 inputs of a row, a
//              lane takes eight adjacent ones (16 bytes), so the tensor cores and cuBLAS both read the checkpoint's layout
//   x, sumsq, norm, eps                              activations.cuh; `input` names the kind
//   y, bias, sumsq_out, permuted, channel_map, scale   epilogue.cuh; `epilogue` and `out_type` name the kind
//   gated      number of gate rows; as many up rows follow them in w. 0: not gated, each row is an output
//
// Weights are never converted. f16 weights are multiplied by activations rounded to f16. bf16 weights (sm_80 and up) are
// multiplied by each activation as the sum of two bf16, which holds an f16 value exactly and an f32 value to 16 bits.
//
// Block: 8 warps, warp s takes slice s of K for the same 16 rows; grid: tiles. Shared bytes: 8 rings of kStages * 2048,
// then 8 * num_tokens * x_stages * 64 * 2 (twice that for bf16); 8 * EXL_NT * 512 at least. See exl/kernels/linear_dense.py.
// Macros: EXL_BF16, EXL_NT 1|2|4, EXL_STAGES. Architectures: sm_75 and up. Tests: tests/kernels/test_linear_dense.py
#include <exl/activations.cuh>
#include <exl/epilogue.cuh>
#include <exl/slices.cuh>
#include <exl/swizzle.cuh>

constexpr int kWarps = 8, kNT = EXL_NT, kStages = EXL_STAGES, kStageK = 64, kSliceK = 128;
constexpr bool kBf16 = EXL_BF16;
constexpr int kPlanes = kBf16 ? 2 : 1;                  // of activations: the high bf16, then the low one
constexpr int kAhead = kHasCpAsync ? kStages - 1 : 1;
constexpr int kWarpBytes = kHasCpAsync ? kStages * 2048 : 0;

// Copies channels [k0, k0 + num_k) of every token to s_x [planes][num_tokens][pitch]. Lane i % 8 holds the factor of token i
// in factor[i / 8].
template <int kKind> EXL_DEVICE void stage_slice(half* s_x, int pitch, const Input& in, int k0, int num_k, const float (&factor)[kNT], int lane) {
  for (int token = 0; token < in.num_tokens; ++token) {
    float f = 1.0f;
    EXL_UNROLL
    for (int n = 0; n < kNT; ++n) {
      const float other = __shfl_sync(0xffffffffu, factor[n], token % 8);
      if (token / 8 == n) f = other;
    }
    for (int chunk = lane; chunk < num_k / 8; chunk += 32) {
      const int k = k0 + chunk * 8;
      half* to = s_x + token * pitch + swizzled_chunk(chunk, token) * 8;
      uint4 high = make_uint4(0, 0, 0, 0), low = high;
      if (k < in.K) {
        if constexpr (!kBf16) {
          high = load_inputs<kKind>(in, token, k, f);
        } else {
          float v[8], rest[8];
          load_floats<kKind>(v, in, token, k, f);
          high = make_uint4(cvt_bf16x2_f32(v[0], v[1]), cvt_bf16x2_f32(v[2], v[3]), cvt_bf16x2_f32(v[4], v[5]), cvt_bf16x2_f32(v[6], v[7]));
          const u32 pairs[4] = {high.x, high.y, high.z, high.w};
          EXL_UNROLL
          for (int i = 0; i < 4; ++i) {
            rest[2 * i] = v[2 * i] - __uint_as_float(pairs[i] << 16);
            rest[2 * i + 1] = v[2 * i + 1] - __uint_as_float(pairs[i] & 0xffff0000u);
          }
          low = make_uint4(cvt_bf16x2_f32(rest[0], rest[1]), cvt_bf16x2_f32(rest[2], rest[3]),
                           cvt_bf16x2_f32(rest[4], rest[5]), cvt_bf16x2_f32(rest[6], rest[7]));
        }
      }
      *reinterpret_cast<uint4*>(to) = high;
      if constexpr (kBf16) *reinterpret_cast<uint4*>(to + in.num_tokens * pitch) = low;
    }
  }
}

// Prefetches one lane's weights. Per stage: [inputs 0..31, 32..63][row g, row g + 8], 16 bytes each, in the lane's own ring.
struct DenseRing {
  const u16* row[2];
  uint4* ring;
  uint4 next[2][2];
  int K;

  EXL_DEVICE void fetch(int stage, int slot, int t) {
    EXL_UNROLL
    for (int b = 0; b < 2; ++b) {
      const int k = stage * kStageK + b * 32 + 8 * t;
      EXL_UNROLL
      for (int i = 0; i < 2; ++i) {
        if constexpr (kHasCpAsync) cp_async_16(ring + (slot * 4 + b * 2 + i) * 32, row[i] + (k < K ? k : 0), k < K ? 16 : 0);
        else next[b][i] = k < K ? ld_global_nc_u32x4(row[i] + k) : make_uint4(0, 0, 0, 0);
      }
    }
  }
  EXL_DEVICE void take(uint4 (&w)[2][2], int slot) const {
    EXL_UNROLL
    for (int b = 0; b < 2; ++b)
      EXL_UNROLL
      for (int i = 0; i < 2; ++i) w[b][i] = kHasCpAsync ? ring[(slot * 4 + b * 2 + i) * 32] : next[b][i];
  }
};

EXL_DEVICE void multiply(FragC& acc, const FragA& a, const FragB& b) {
  if constexpr (kBf16) mma_m16n8k16_bf16(acc, a, b);
  else mma_m16n8k16(acc, a, b);
}

EXL_KERNEL(linear_dense, 256, 1)
(const void* __restrict__ w, const float* __restrict__ bias, const void* x, const float* sumsq,
 const float* __restrict__ norm, void* y, float* sumsq_out, float* permuted, const i32* __restrict__ channel_map, int K, int N,
 int num_tiles, int gated, i64 w_stride, int num_tokens, int input, int x_stride, int x_stages, int epilogue, int out_type,
 int y_stride, float eps, float scale) {
  EXL_DYNAMIC_SMEM(u8, smem);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int num_units = (K + kSliceK - 1) / kSliceK, num_stages = (K + kStageK - 1) / kStageK;
  const int border = slice_start(warp + 1, num_units) * 2;
  const int first = slice_start(warp, num_units) * 2, last = border < num_stages ? border : num_stages;
  const int tile = static_cast<int>(blockIdx.x);

  DenseRing weights;
  weights.K = K;
  weights.ring = reinterpret_cast<uint4*>(smem + warp * kWarpBytes) + lane;
  EXL_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int wanted = gated ? tile * 8 + g : tile * 16 + g + 8 * i, most = (gated ? gated : N) - 1;
    const int row = (wanted < most ? wanted : most) + (gated ? i * gated : 0);   // past the end: read the last row; the result is not stored
    weights.row[i] = static_cast<const u16*>(w) + static_cast<size_t>(row) * static_cast<size_t>(w_stride);
  }
  for (int s = 0; s < kAhead; ++s) {
    if (first + s < last) weights.fetch(first + s, s, t);
    cp_async_commit_group();
  }
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();   // only after this may results of earlier kernels be read

  const Input in{x, sumsq, norm, eps, K, x_stride, num_tokens};
  u32 largest[kNT] = {};   // f16 weights, bf16 inputs: bits of the largest input of token 8 n + lane in this slice
  float factor[kNT] = {};  // factor of token 8 n + lane's activations
  const bool scaled = !kBf16 && input == kBfloatInput;
  EXL_UNROLL
  for (int n = 0; n < kNT; ++n) {
    factor[n] = 1.0f;
    for (int i = 0; i < 8 && n * 8 + i < num_tokens; ++i) {
      if (scaled) {
        const u32 m = warp_max_magnitude(in, n * 8 + i, first * kStageK, last * kStageK < K ? last * kStageK : K, lane);
        if (lane == i) { largest[n] = m; factor[n] = into_range(m); }
      } else if (input == kNormedInput) {
        const float r = warp_inverse_rms(in, n * 8 + i, lane);
        if (lane == i) factor[n] = r;
      }
    }
  }

  const int pitch = x_stages * kStageK;
  half* s_x = reinterpret_cast<half*>(smem + kWarps * kWarpBytes) + warp * kPlanes * num_tokens * pitch;
  const half* at[kNT];     // activations of token 8 n + g; past the end: the last token's, whose result is not stored
  EXL_UNROLL
  for (int n = 0; n < kNT; ++n) at[n] = s_x + (n * 8 + g < num_tokens ? n * 8 + g : num_tokens - 1) * pitch;
  FragC acc[kNT] = {};
  int slot = 0;
  for (int chunk = first; chunk < last; chunk += x_stages) {
    const int stop = chunk + x_stages < last ? chunk + x_stages : last;
    const int k0 = chunk * kStageK, num_k = (stop - chunk) * kStageK;
    __syncwarp();          // all lanes have read the previous chunk
    if (input == kHalfInput) stage_slice<kHalfInput>(s_x, pitch, in, k0, num_k, factor, lane);
    else if (input == kBfloatInput) stage_slice<kBfloatInput>(s_x, pitch, in, k0, num_k, factor, lane);
    else stage_slice<kNormedInput>(s_x, pitch, in, k0, num_k, factor, lane);
    __syncwarp();
    for (int stage = chunk; stage < stop; ++stage) {
      cp_async_wait_group<kAhead - 1>();   // a lane reads only what it copied itself: no barrier
      uint4 v[2][2];
      weights.take(v, slot);
      if (stage + kAhead < last) weights.fetch(stage + kAhead, slot == 0 ? kStages - 1 : slot - 1, t);
      cp_async_commit_group();
      slot = slot + 1 == kStages ? 0 : slot + 1;
      EXL_UNROLL
      for (int b = 0; b < 2; ++b) {
        const FragA a0{{v[b][0].x, v[b][1].x, v[b][0].y, v[b][1].y}}, a1{{v[b][0].z, v[b][1].z, v[b][0].w, v[b][1].w}};
        EXL_UNROLL
        for (int n = 0; n < kNT; ++n) {
          const int token = n * 8 + g < num_tokens ? n * 8 + g : num_tokens - 1;
          const half* p = at[n] + swizzled_chunk((stage - chunk) * 8 + b * 4 + t, token) * 8;
          EXL_UNROLL
          for (int plane = kPlanes - 1; plane >= 0; --plane) {   // the low part first
            const uint4 in8 = *reinterpret_cast<const uint4*>(p + plane * num_tokens * pitch);
            multiply(acc[n], a0, FragB{{in8.x, in8.y}});
            multiply(acc[n], a1, FragB{{in8.z, in8.w}});
          }
        }
      }
    }
  }
  EXL_UNROLL
  for (int n = 0; n < kNT; ++n) {
    const float even = out_of_range(__shfl_sync(0xffffffffu, largest[n], 2 * t)), odd = out_of_range(__shfl_sync(0xffffffffu, largest[n], 2 * t + 1));
    if (scaled) { acc[n].r[0] *= even; acc[n].r[1] *= odd; acc[n].r[2] *= even; acc[n].r[3] *= odd; }
  }

  __syncthreads();         // the rings' bytes are reused for the slices' sums
  float4* s_sum = reinterpret_cast<float4*>(smem);
  EXL_UNROLL
  for (int n = 0; n < kNT; ++n) s_sum[(warp * kNT + n) * 32 + lane] = make_float4(acc[n].r[0], acc[n].r[1], acc[n].r[2], acc[n].r[3]);
  __syncthreads();
  if (warp >= kNT) return;
  float4 v[kSlices];
  EXL_UNROLL
  for (int s = 0; s < kSlices; ++s) v[s] = s_sum[(s * kNT + warp) * 32 + lane];
  const float4 root = tree_sum(v);
  float sum[4] = {root.x, root.y, root.z, root.w};
  const Output out{y, bias, sumsq_out, permuted, channel_map, epilogue, out_type, N, num_tokens, y_stride, scale};
  finish_tile(sum, out, tile, num_tiles, warp * 8, lane);
}
