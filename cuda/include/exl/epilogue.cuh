#pragma once
// What happens to finished sums. A lane holds, as in the mma's result, v[0], v[1]: row g of a 16-row tile, tokens 2t and
// 2t+1 of eight; v[2], v[3]: row g + 8.
//
// Macros: EXL_EPILOGUE 0 store; 1 SiLU(gate) * up, gate in rows 0..7 and up in rows 8..15 of each tile; 2 residual add in
// f32, with the sum of squares of every tile and token. EXL_OUT 0 f16, 1 bf16, 2 f32 (residual: always f32).
#include <exl/half.cuh>

constexpr int kEpilogue = EXL_EPILOGUE;
constexpr int kEpilogueStore = 0, kEpilogueGated = 1, kEpilogueResidual = 2;
template <int kOut> struct OutType { using type = half; };
template <> struct OutType<1> { using type = bf16; };
template <> struct OutType<2> { using type = float; };
using Out = OutType<EXL_OUT>::type;

struct Output {
  void* y;                // [num_tokens, row_stride], see EXL_OUT; residual: f32, read and written
  const float* bias;      // [tiles * 16] in the order of the tiles' rows, or null
  float* sumsq;           // residual: [num_tokens, tiles]
  float* permuted;        // residual: [num_tokens, N], a second copy with column n at positions[n], or null
  const i32* positions;   // [N]
  int N;                  // columns of y: rows of the matrix; gated: half of them
  int num_tokens, row_stride;
  float scale;            // residual: y += scale * (sum + bias)
};

EXL_DEVICE float silu(float x) { return x / (1.0f + ex2_approx(x * -1.44269504f)); }

// All lanes of a warp, for tokens token0 .. token0 + 7.
EXL_DEVICE void finish_tile(float (&v)[4], const Output& out, int tile, int num_tiles, int token0, int lane) {
  const int g = lane / 4, t = lane % 4;
  if (out.bias != nullptr) {
    const float lo = out.bias[tile * 16 + g], hi = out.bias[tile * 16 + g + 8];
    v[0] += lo; v[1] += lo; v[2] += hi; v[3] += hi;
  }
  if constexpr (kEpilogue == kEpilogueStore) {
    Out* y = static_cast<Out*>(out.y);
    EXL_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int col = tile * 16 + g + 8 * (e / 2), token = token0 + 2 * t + e % 2;
      if (col < out.N && token < out.num_tokens) y[static_cast<size_t>(token) * out.row_stride + col] = from_float<Out>(v[e]);
    }
  }
  if constexpr (kEpilogue == kEpilogueGated) {
    Out* y = static_cast<Out*>(out.y);
    EXL_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int col = tile * 8 + g, token = token0 + 2 * t + e;
      if (col < out.N && token < out.num_tokens)
        y[static_cast<size_t>(token) * out.row_stride + col] = from_float<Out>(silu(v[e]) * v[e + 2]);
    }
  }
  if constexpr (kEpilogue == kEpilogueResidual) {
    float* y = static_cast<float*>(out.y);
    float square[2] = {0.0f, 0.0f};
    EXL_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int col = tile * 16 + g + 8 * (e / 2), token = token0 + 2 * t + e % 2;
      if (col < out.N && token < out.num_tokens) {
        float* at = y + static_cast<size_t>(token) * out.row_stride + col;
        const float sum = fmaf(out.scale, v[e], *at);
        *at = sum;
        if (out.permuted != nullptr) out.permuted[static_cast<size_t>(token) * out.N + out.positions[col]] = sum;
        square[e % 2] = fmaf(sum, sum, square[e % 2]);
      }
    }
    EXL_UNROLL
    for (int e = 0; e < 2; ++e) {
      EXL_UNROLL
      for (int d = 4; d < 32; d *= 2) square[e] += __shfl_xor_sync(0xffffffffu, square[e], d);
      const int token = token0 + 2 * t + e;
      if (g == 0 && token < out.num_tokens) out.sumsq[static_cast<size_t>(token) * num_tiles + tile] = square[e];
    }
  }
}
