#pragma once
// The epilogue of the linear kernels. A lane holds, as in an mma's result, v[0], v[1]: row g of a 16-row tile, tokens 2t
// and 2t+1 of eight; v[2], v[3]: row g + 8. The kind is chosen at run time, once per tile and the same for all lanes.
//
// Macros: EXL_GELU, if defined: gated products take GELU (its approximation by tanh) of the gate, not SiLU.
#include <exl/half.cuh>

constexpr int kStore = 0;      // y = v
constexpr int kGated = 1;      // y = activated(gate) * up: gate in rows 0..7 of each tile, up in rows 8..15
constexpr int kResidual = 2;   // y += scale * v in f32, and the new y's sum of squares per tile and token
constexpr int kHalfOut = 0, kBfloatOut = 1, kFloatOut = 2;

struct Output {
  void* y;                // [num_tokens, stride], f16 (saturated), bf16 or f32 as `type` says; kResidual: f32, read and written
  const float* bias;      // f32 [tiles * 16] in the order of the tiles' rows, or null
  float* sumsq;           // kResidual: f32 [num_tokens, tiles]
  float* permuted;        // kResidual: f32 [num_tokens, N], a second copy with column n at channel_map[n], or null
  const i32* channel_map; // i32 [N]
  int kind, type;
  int N;                  // columns of y
  int num_tokens, stride;
  float scale;
};

// SiLU: x / (1 + e^-x). GELU: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), which is x / (1 + e^-2u) of tanh's
// argument u, and exact to f32 where 1 + tanh(u) would lose all digits.
EXL_DEVICE float activated(float x) {
#if defined(EXL_GELU)
  return x / (1.0f + ex2_approx(x * fmaf(x * x, -0.102943241f, -2.30220819f)));
#else
  return x / (1.0f + ex2_approx(x * -1.44269504f));
#endif
}

EXL_DEVICE void store_output(const Output& out, int token, int col, float v) {
  if (col >= out.N || token >= out.num_tokens) return;
  const size_t at = static_cast<size_t>(token) * out.stride + col;
  if (out.type == kHalfOut) static_cast<half*>(out.y)[at] = saturated_half(v);
  else if (out.type == kBfloatOut) static_cast<bf16*>(out.y)[at] = __float2bfloat16_rn(v);
  else static_cast<float*>(out.y)[at] = v;
}

EXL_DEVICE void add_residual(const float (&v)[4], const Output& out, int tile, int num_tiles, int token0, int lane) {
  const int g = lane / 4, t = lane % 4;
  float* y = static_cast<float*>(out.y);
  float square[2] = {0.0f, 0.0f};
  EXL_UNROLL
  for (int e = 0; e < 4; ++e) {
    const int col = tile * 16 + g + 8 * (e / 2), token = token0 + 2 * t + e % 2;
    if (col < out.N && token < out.num_tokens) {
      float* at = y + static_cast<size_t>(token) * out.stride + col;
      const float sum = fmaf(out.scale, v[e], *at);
      *at = sum;
      if (out.permuted != nullptr) out.permuted[static_cast<size_t>(token) * out.N + out.channel_map[col]] = sum;
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

// Adds the bias and stores one tile for tokens token0 .. token0 + 7. All lanes of a warp must call it.
EXL_DEVICE void finish_tile(float (&v)[4], const Output& out, int tile, int num_tiles, int token0, int lane) {
  const int g = lane / 4, t = lane % 4;
  if (out.bias != nullptr) {
    const float lo = out.bias[tile * 16 + g], hi = out.bias[tile * 16 + g + 8];
    v[0] += lo; v[1] += lo; v[2] += hi; v[3] += hi;
  }
  if (out.kind == kResidual) {
    add_residual(v, out, tile, num_tiles, token0, lane);
  } else if (out.kind == kGated) {
    EXL_UNROLL
    for (int e = 0; e < 2; ++e) store_output(out, token0 + 2 * t + e, tile * 8 + g, activated(v[e]) * v[e + 2]);
  } else {
    EXL_UNROLL
    for (int e = 0; e < 4; ++e) store_output(out, token0 + 2 * t + e % 2, tile * 16 + g + 8 * (e / 2), v[e]);
  }
}
