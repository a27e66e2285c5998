#pragma once
// A quantized matrix in 16-row tiles, as exl/layout/tiles.py packs it: where each stage's codes, scales and zero points are.
//
// Macros: EXL_BITS 2|3|4|8; EXL_GROUP 32|64|128, or 0: any multiple of 128, or all of K; EXL_SYM 1: every zero point
// is 2^(bits-1) and none are stored; EXL_SCALE 0|1|2: scales are f16, bf16 or f32.
#include <exl/dequant.cuh>
#include <exl/half.cuh>

using Q = Quant<EXL_BITS>;
constexpr int kBits = EXL_BITS, kGroup = EXL_GROUP;
constexpr bool kSymmetric = EXL_SYM;
constexpr int kStageK = Q::kStageK;
constexpr int kLoads = kStageK * kBits * 16 / 8 / 512;             // 16-byte loads per lane, row tile and stage
constexpr int kUnitK = kGroup == 0 ? 128 : kGroup;                 // a unit: inputs summed before a scale is applied
constexpr int kUnits = kStageK / kUnitK;

// A block of `qparams`: scales [8 (g)][units][row g, row g + 8], then zero points [8 (g)][units]. It has all groups of one
// stage or, with EXL_GROUP 0, one group.
constexpr int kScaleBytes = EXL_SCALE == 2 ? 4 : 2;
constexpr int kZeroBytes = kBits == 8 ? 2 : 1;                     // per unit, rows g and g + 8 together
constexpr int kBlockUnits = kGroup == 0 ? 1 : kUnits;
constexpr int kBlocks = kUnits / kBlockUnits;                      // blocks that a stage reads
constexpr int kRowScales = kBlockUnits * 2 * kScaleBytes, kRowZeros = kSymmetric ? 0 : kBlockUnits * kZeroBytes;   // bytes
constexpr int kBlockBytes = 8 * (kRowScales + kRowZeros);

// A matrix in device memory. codes: u32 [tiles][stages][kLoads][32 lanes][4]; qparams: u8 [tiles][num_blocks][kBlockBytes].
struct TiledMatrix {
  const u32* codes;
  const u8* qparams;
  int num_tiles, num_stages, num_blocks;
  int group_units;     // EXL_GROUP 0: group size / 128

  // Past the last tile: the last one, whose repeated result is not stored.
  EXL_DEVICE size_t tile_of(int tile) const { return static_cast<size_t>(tile < num_tiles ? tile : num_tiles - 1); }
  EXL_DEVICE const uint4* codes_of(int tile, int stage) const {
    return reinterpret_cast<const uint4*>(codes) + (tile_of(tile) * num_stages + stage) * (kLoads * 32);
  }
};

// Walks through the blocks of a tile's qparams, one stage per step. `which`: of the kBlocks blocks that a stage reads.
struct BlockWalk {
  const u8* block;
  int left;            // EXL_GROUP 0: units until the next group

  EXL_DEVICE void start(const TiledMatrix& m, int tile, int stage, int which) {
    const int unit = stage * kUnits + which, at = kGroup == 0 ? unit / m.group_units : stage;
    block = m.qparams + (m.tile_of(tile) * m.num_blocks + at) * kBlockBytes;
    left = kGroup == 0 ? m.group_units - unit % m.group_units : 0;
  }
  EXL_DEVICE void step(int group_units) {   // at most one border per step: group_units >= kUnits, or K is one stage
    if (kGroup != 0) {
      block += kBlockBytes;
    } else if ((left -= kUnits) <= 0) {
      left += group_units;
      block += kBlockBytes;
    }
  }
};

template <int kBytes> EXL_DEVICE void read_words(u32* to, const u8* from) {
  if constexpr (kBytes == 1) to[0] = *from;
  else if constexpr (kBytes == 2) to[0] = *reinterpret_cast<const u16*>(from);
  else if constexpr (kBytes == 4) to[0] = *reinterpret_cast<const u32*>(from);
  else if constexpr (kBytes == 8) { const uint2 v = *reinterpret_cast<const uint2*>(from); to[0] = v.x; to[1] = v.y; }
  else {
    EXL_UNROLL
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 v = reinterpret_cast<const uint4*>(from)[i];
      to[i * 4] = v.x; to[i * 4 + 1] = v.y; to[i * 4 + 2] = v.z; to[i * 4 + 3] = v.w;
    }
  }
}

// Scales and zero points of one stage for a lane's rows g and g + 8.
struct QParams {
  static constexpr int kScaleWords = kRowScales / 4, kZeroWords = kRowZeros < 4 ? 1 : kRowZeros / 4;   // per block
  u32 scales[kBlocks * kScaleWords], zeros[kBlocks * kZeroWords];

  // Reads the parts of block `which` that belong to the lane's rows.
  EXL_DEVICE void read(int which, const u8* row_scales, const u8* row_zeros) {
    read_words<kRowScales>(scales + which * kScaleWords, row_scales);
    if constexpr (!kSymmetric) read_words<kRowZeros>(zeros + which * kZeroWords, row_zeros);
  }
  EXL_DEVICE void read_block(int which, const u8* block, int g) {
    read(which, block + g * kRowScales, block + 8 * kRowScales + g * kRowZeros);
  }
  // Scales [row g, row g + 8] of one unit, exact in f32.
  EXL_DEVICE float2 scale(int unit) const {
    if constexpr (EXL_SCALE == 2) return make_float2(__uint_as_float(scales[unit * 2]), __uint_as_float(scales[unit * 2 + 1]));
    const u32 both = scales[unit];
    if constexpr (EXL_SCALE == 1) return make_float2(__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u));
    return make_float2(__low2float(bits_half2(both)), __high2float(bits_half2(both)));
  }
  // Zero points of one unit as Q::zero wants them.
  EXL_DEVICE u32 packed_zeros(int unit) const {
    if constexpr (kSymmetric) return kBits == 8 ? 0x8080u : 0x10001u * (kBits == 4 ? 0x88u : kBits == 3 ? 044u : 0xaau);
    const int at = unit % kBlockUnits * kZeroBytes, byte = at % 4;
    const u32 word = zeros[unit / kBlockUnits * kZeroWords + at / 4];
    if (kBits == 8) return word >> 8 * byte;
    return prmt(word, 0u, 0x4040u + 0x0101u * static_cast<u32>(byte));
  }
  EXL_DEVICE Q::Zero zero(int unit) const { return Q::zero<kSymmetric>(packed_zeros(unit)); }
};
