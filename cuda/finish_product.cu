// finish_product: the epilogue of linear_q for a product that cuBLAS computed from a dequantized panel.
//
//   product    f32 [num_tokens, 16 * panel tiles]: columns in the order of the panel's rows
//   y, bias, sumsq_out, permuted, channel_map, scale   epilogue.cuh; `epilogue` and `out_type` name the kind
//   first_tile first tile of the panel in the matrix, which has num_tiles
//
// Block: 8 warps, each with one tile and 8 tokens; grid: (ceil(panel tiles / 8), ceil(num_tokens / 8)). No shared memory.
// Macros: none. Architectures: all. Tests: tests/kernels/test_linear_many.py
#include <exl/epilogue.cuh>

EXL_KERNEL(finish_product, 256, 2)
(const float* __restrict__ product, const float* __restrict__ bias, void* y, float* sumsq_out, float* permuted,
 const i32* __restrict__ channel_map, int N, int num_tiles, int first_tile, int panel_tiles, int num_tokens, int epilogue,
 int out_type, int y_stride, float scale) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int tile = static_cast<int>(blockIdx.x) * 8 + warp, token0 = static_cast<int>(blockIdx.y) * 8;
  if (tile >= panel_tiles) return;   // whole warps; there is no block barrier
  float v[4];
  EXL_UNROLL
  for (int e = 0; e < 4; ++e) {
    const int token = token0 + 2 * t + e % 2, row = tile * 16 + g + 8 * (e / 2);
    v[e] = token < num_tokens ? product[static_cast<size_t>(token) * (16 * panel_tiles) + row] : 0.0f;
  }
  const Output out{y, bias, sumsq_out, permuted, channel_map, epilogue, out_type, N, num_tokens, y_stride, scale};
  finish_tile(v, out, first_tile + tile, num_tiles, token0, lane);
}
