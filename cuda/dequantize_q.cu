// dequantize_q: a panel of a quantized matrix as f16 or bf16, row major, for a matrix product by cuBLAS.
//
//   codes, qparams, group_units   as in linear_q.cu
//   y          f16 or bf16 (EXL_BF16) [16 * panel tiles, K]: scale * (code - zero), computed in f32 (exact unless scales
//              are f32), rounded once to the type of y; rows in the tiles' order;
//              gated: rows 0..7 of all tiles first, then rows 8..15 of all tiles (gate above up)
//   first_tile first tile of the panel; the panel has gridDim.y tiles
//
// Block: 8 warps, each with one stage of one tile; grid: (ceil(stages / 8), panel tiles). No shared memory.
// Macros: tile.cuh; EXL_BF16. Architectures: all. Tests: tests/kernels/test_dequantize.py
#include <exl/half.cuh>
#include <exl/tile.cuh>

#if EXL_BF16
using Out = bf16;
#else
using Out = half;
#endif

// Two exact halves times a scale, rounded once.
EXL_DEVICE u32 scaled_pair(u32 pair, float scale) {
  const float lo = __low2float(bits_half2(pair)) * scale, hi = __high2float(bits_half2(pair)) * scale;
  return EXL_BF16 ? cvt_bf16x2_f32(lo, hi) : cvt_f16x2_f32(lo, hi);
}

EXL_KERNEL(dequantize_q, 256, 2)
(const u32* __restrict__ codes, const u8* __restrict__ qparams, Out* y, int K, int num_tiles, int num_blocks, int group_units,
 int first_tile, int gated) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int num_stages = (K + kStageK - 1) / kStageK;
  const int stage = static_cast<int>(blockIdx.x) * 8 + warp, tile = first_tile + static_cast<int>(blockIdx.y);
  if (stage >= num_stages) return;
  const TiledMatrix matrix{codes, qparams, num_tiles, num_stages, num_blocks, group_units};
  const uint4* src = matrix.codes_of(tile, stage) + lane;
  u32 words[kLoads * 4];
  EXL_UNROLL
  for (int i = 0; i < kLoads; ++i) read_words<16>(words + i * 4, reinterpret_cast<const u8*>(src + i * 32));
  QParams now;
  EXL_UNROLL
  for (int q = 0; q < kBlocks; ++q) {
    BlockWalk walk;
    walk.start(matrix, tile, stage, q);
    now.read_block(q, walk.block, g);
  }

  const int panel_tile = static_cast<int>(blockIdx.y), half_rows = 8 * static_cast<int>(gridDim.y);
  const int row_lo = gated ? panel_tile * 8 + g : panel_tile * 16 + g, row_hi = gated ? half_rows + row_lo : row_lo + 8;
  EXL_UNROLL
  for (int b = 0; b < kStageK / 32; ++b) {          // 32 inputs: per lane and row 8 of them, 16 bytes
    const int unit = b * 32 / kUnitK, k = stage * kStageK + b * 32 + 8 * t;
    const float2 scale = now.scale(unit);
    const Q::Zero zero = now.zero(unit);
    const FragA a = Q::fragment(words, b / 2, b % 2 * 2, zero), c = Q::fragment(words, b / 2, b % 2 * 2 + 1, zero);
    if (k >= K) continue;                           // padding beyond K
    *reinterpret_cast<uint4*>(y + static_cast<size_t>(row_lo) * K + k) =
        make_uint4(scaled_pair(a.r[0], scale.x), scaled_pair(a.r[2], scale.x), scaled_pair(c.r[0], scale.x), scaled_pair(c.r[2], scale.x));
    *reinterpret_cast<uint4*>(y + static_cast<size_t>(row_hi) * K + k) =
        make_uint4(scaled_pair(a.r[1], scale.y), scaled_pair(a.r[3], scale.y), scaled_pair(c.r[1], scale.y), scaled_pair(c.r[3], scale.y));
  }
}
