#pragma once
// One matrix in 16-row tiles, as exl/kernels/tile_layout.py packs it: sizes of a stage, and the way through scales and
// zero points.
//
// Macros: EXL_BITS 2|3|4|8; EXL_GROUP 32|64|128, or 0: any multiple of 128, or all of K; EXL_SYM 1: every zero point
// is 2^(bits-1) and none are stored.
#include <exl/dequant.cuh>

using Q = Quant<EXL_BITS>;
constexpr int kBits = EXL_BITS, kGroup = EXL_GROUP;
constexpr bool kSymmetric = EXL_SYM;
constexpr int kStageK = Q::kStageK;
constexpr int kLoads = kStageK * kBits * 16 / 8 / 512;             // 16-byte loads a lane and row tile, a stage
constexpr int kUnitK = kGroup == 0 ? 128 : kGroup;                 // inputs between two uses of a scale
constexpr int kUnits = kStageK / kUnitK;
constexpr int kZeroBytes = kBits == 8 ? 2 : 1;                     // of rows g and g + 8 together

// Scales and zero points of one stage: one unit each, rows g and g + 8 together.
struct Meta {
  u32 scale[kUnits];   // f16 of row g, f16 of row g + 8
  u32 zero[kUnits];    // packed as dequant.cuh wants them
};

// Walks a row tile's scales and zero points. scales: u32 [groups][8]; zeros: u8 or u16 [groups][8].
struct MetaStream {
  const u32* scales;
  const u8* zeros;
  int left;            // kGroup 0: units until the next group

  EXL_DEVICE void start(const u32* tile_scales, const u8* tile_zeros, int stage, int group_units, int g) {
    const int unit = stage * kUnits, group = kGroup == 0 ? unit / group_units : unit;
    scales = tile_scales + group * 8 + g;
    if (!kSymmetric) zeros = tile_zeros + (group * 8 + g) * kZeroBytes;
    left = kGroup == 0 ? group_units - unit % group_units : 0;
  }
  // Scales and zeros `ahead` stages on (kGroup 0 keeps its own count: always the next stage).
  EXL_DEVICE void load(Meta& m, int ahead, int group_units) {
    EXL_UNROLL
    for (int q = 0; q < kUnits; ++q) {
      const int at = kGroup == 0 ? 0 : (ahead * kUnits + q) * 8;
      m.scale[q] = scales[at];
      if (kSymmetric) m.zero[q] = 0;
      else if (kZeroBytes == 1) m.zero[q] = zeros[at];
      else m.zero[q] = reinterpret_cast<const u16*>(zeros)[at];
      if (kGroup == 0 && --left == 0) {
        left = group_units;
        scales += 8;
        if (!kSymmetric) zeros += 8 * kZeroBytes;
      }
    }
  }
  EXL_DEVICE void advance(int stages) {
    if (kGroup == 0) return;
    scales += stages * kUnits * 8;
    if (!kSymmetric) zeros += stages * kUnits * 8 * kZeroBytes;
  }
};

// Zero points of rows g and g + 8 that a symmetric matrix does not store.
EXL_DEVICE constexpr u32 symmetric_zero() { return kBits == 8 ? 0x8080u : kBits == 4 ? 0x88u : kBits == 3 ? 044u : 0xaau; }
