#pragma once
// Attention of one warp over pages (page.cuh) on tensor cores: S = K Q^T and O = V^T P, with an online softmax. Operand A is
// codes read straight from the pages; operand B is columns, each one query head and one new token.
//
// Macros: page.cuh; EXL_SINKS, if defined: each query head has one more score, which has no value.
#include <exl/half.cuh>
#include <exl/page.cuh>
#include <exl/softcap.cuh>

constexpr int kRuns = (kD + 31) / 32, kQPitch = kRuns * 32 + 8, kTiles = (kD + 15) / 16;   // kRuns: of 32 channels; kQPitch: halves; kTiles: of V
constexpr float kNone = -1e30f;      // the maximum before any score
constexpr float kLift = 8.0f;        // probabilities are kept times 2^8: their products with V's scales avoid f16's subnormals

// A lane's words of one tile, in the pages' layout: 16 tokens x 64 channels of K, or 16 channels x 64 tokens of V. They make
// four A fragments.
template <int kBits> struct Tile {
  u32 w[kBits];
  EXL_DEVICE void load(const u8* at, int lane) {
    EXL_UNROLL
    for (int p = 0; p < kBits / 4; ++p) {
      const uint4 v = *reinterpret_cast<const uint4*>(at + p * 512 + lane * 16);
      w[p * 4] = v.x; w[p * 4 + 1] = v.y; w[p * 4 + 2] = v.z; w[p * 4 + 3] = v.w;
    }
  }
  // K's last tile if kD % 64 != 0: units of 8 channels, stored as [unit][g][r]; missing units become codes of value zero.
  EXL_DEVICE void load_part(const u8* at, int g, int t) {
    EXL_UNROLL
    for (int i = 0; i < kBits; ++i) w[i] = kBits == 4 ? 0x88888888u : kBits == 8 ? 0x80808080u : 0u;
    EXL_UNROLL
    for (int h = 0; h < 2; ++h) {
      if (h * 4 + t >= kD % 64 / 8) continue;
      const u32* unit = reinterpret_cast<const u32*>(at + ((h * 4 + t) * 8 + g) * 2 * kBits);
      EXL_UNROLL
      for (int i = 0; i < kBits / 2; ++i) w[h * (kBits / 2) + i] = unit[i];
    }
  }
  // V's last tile if it has eight channels: rows g only. Rows g + 8 hold arbitrary values; their results are not stored.
  EXL_DEVICE void load_eight(const u8* at, int lane) {
    if constexpr (kBits == 4) {   // channels c and c + 4 share bytes
      const uint4 v = *reinterpret_cast<const uint4*>(at + lane % 16 * 16);
      const int shift = lane / 16 * 4;
      w[0] = v.x >> shift; w[1] = v.y >> shift; w[2] = v.z >> shift; w[3] = v.w >> shift;
    } else {
      EXL_UNROLL
      for (int p = 0; p < kBits / 8; ++p) {   // each word is used for both rows g and g + 8
        const uint4 v = *reinterpret_cast<const uint4*>(at + p * 512 + lane * 16);
        if constexpr (kBits == 8) {
          w[0] = w[1] = v.x; w[2] = w[3] = v.y; w[4] = w[5] = v.z; w[6] = w[7] = v.w;
        } else {
          w[p * 8] = w[p * 8 + 1] = v.x; w[p * 8 + 2] = w[p * 8 + 3] = v.y;
          w[p * 8 + 4] = w[p * 8 + 5] = v.z; w[p * 8 + 6] = w[p * 8 + 7] = v.w;
        }
      }
    }
  }
  EXL_DEVICE static FragA four_bits(u32 word) {
    const u32 hi = word >> 8;
    FragA a;
    a.r[0] = sub_f16x2(lop3<0xea>(word, 0x000f000fu, 0x64006400u), 0x64086408u);               // 1024 + 8
    a.r[1] = fma_f16x2(lop3<0xea>(word, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);  // / 16 - 72
    a.r[2] = sub_f16x2(lop3<0xea>(hi, 0x000f000fu, 0x64006400u), 0x64086408u);
    a.r[3] = fma_f16x2(lop3<0xea>(hi, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
    return a;
  }
  EXL_DEVICE static FragA eight_bits(u32 row, u32 row8) {
    FragA a;
    a.r[0] = sub_f16x2(prmt(row, 0x64646464u, 0x4140u), 0x64806480u);    // 1024 + 128
    a.r[1] = sub_f16x2(prmt(row8, 0x64646464u, 0x4140u), 0x64806480u);
    a.r[2] = sub_f16x2(prmt(row, 0x64646464u, 0x4342u), 0x64806480u);
    a.r[3] = sub_f16x2(prmt(row8, 0x64646464u, 0x4342u), 0x64806480u);
    return a;
  }
  // K: the fragment of mma s (0, 1) of run h: rows (tokens) g and g + 8, channels 8 t + 4 s .. + 3 of the run in lane t.
  EXL_DEVICE FragA of_k(int h, int s) const {
    if constexpr (kBits == 4) {
      const u32 lo = w[2 * h] >> 8 * s, hi = w[2 * h + 1] >> 8 * s;   // one unit of row g, one of row g + 8
      FragA a;
      a.r[0] = sub_f16x2(lop3<0xea>(lo, 0x000f000fu, 0x64006400u), 0x64086408u);
      a.r[1] = sub_f16x2(lop3<0xea>(hi, 0x000f000fu, 0x64006400u), 0x64086408u);
      a.r[2] = fma_f16x2(lop3<0xea>(lo, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
      a.r[3] = fma_f16x2(lop3<0xea>(hi, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
      return a;
    } else if constexpr (kBits == 8) {
      return eight_bits(w[4 * h + s], w[4 * h + 2 + s]);
    } else {
      return FragA{{w[8 * h + 2 * s], w[8 * h + 4 + 2 * s], w[8 * h + 2 * s + 1], w[8 * h + 4 + 2 * s + 1]}};
    }
  }
  // V: the fragment of mma j: rows (channels) g and g + 8, tokens 16 j .. 16 j + 15.
  EXL_DEVICE FragA of_v(int j) const {
    if constexpr (kBits == 4) return four_bits(w[j]);
    else if constexpr (kBits == 8) return eight_bits(w[2 * j], w[2 * j + 1]);
    else return FragA{{w[4 * j], w[4 * j + 1], w[4 * j + 2], w[4 * j + 3]}};
  }
};

// Softmax state of a warp's 8 kN columns: O, maxima m and sums l. Of each eight a lane holds columns 2t and 2t + 1.
template <int kN> struct Attended {
  FragC o[kN][kTiles];
  float m[kN][2], l[kN][2];   // l: the sum over this lane's rows only
};

struct Question {   // the tokens that one column sees
  int first, last;  // both included
};

// The columns of a block or warp: column c is query head (column0 + c) % group of the kv head and new token
// (column0 + c) / group.
struct Columns {
  int column0, count, group, before, window;   // before: tokens of the sequence ahead of the new ones
  EXL_DEVICE Question question(int c) const {
    const int place = before + (column0 + c) / group;
    return Question{window > 0 ? place - window + 1 : 0, c < count ? place : -1};
  }
};

// The score of a dot product, scaled, capped and times log2(e), so that 2^x gives its weight.
EXL_DEVICE float log2_score(float x, float scale, float softcap) {
  return capped(x * scale, softcap) * kLog2E;
}

#if defined(EXL_SINKS)
constexpr bool kSinks = true;
#else
constexpr bool kSinks = false;
#endif

// What a head's sink adds to a column's sum l, whose maximum is `top`. It may be infinite: then the column's output is 0. A
// column that sees no token has the maximum kNone.
EXL_DEVICE float sink_weight(float sink, float top) { return ex2_approx(sink * kLog2E - top + (kHasMma ? kLift : 0.0f)); }

// s += K Q^T over channels 64 tile .. 64 tile + 63, or fewer in a last tile. Loads for all 64 tokens are in flight together.
template <bool kWhole, int kN>
EXL_DEVICE void score_tile(float (&s)[4][kN][4], const u8* page, const half* s_q, int tile, int lane) {
  constexpr int kHere = kWhole ? 2 : kRuns % 2 == 0 ? 2 : 1;   // runs
  const int g = lane / 4, t = lane % 4;
  EXL_UNROLL
  for (int tt = 0; tt < 4; ++tt) {
    Tile<kKBits> k;
    const u8* at = page + tt * (2 * kD * kKBits) + tile * (128 * kKBits);
    if constexpr (kWhole) k.load(at, lane);
    else k.load_part(at, g, t);
    EXL_UNROLL
    for (int h = 0; h < kHere; ++h) {
      const int run = tile * 2 + h;
      const FragA first = k.of_k(h, 0), second = k.of_k(h, 1);
      float lo = 1.0f, hi = 1.0f;
      if constexpr (kQuantized) {
        const half2 pair = bits_half2(*reinterpret_cast<const u32*>(page + k_scale_at(tt * 16 + g, run)));
        lo = __low2float(pair); hi = __high2float(pair);
      }
      EXL_UNROLL
      for (int n = 0; n < kN; ++n) {
        const uint4 x = *reinterpret_cast<const uint4*>(s_q + (n * 8 + g) * kQPitch + run * 32 + 8 * t);
        FragC part{{0.0f, 0.0f, 0.0f, 0.0f}};
        mma_m16n8k16(part, first, FragB{{x.x, x.y}});
        mma_m16n8k16(part, second, FragB{{x.z, x.w}});
        s[tt][n][0] = fmaf(lo, part.r[0], s[tt][n][0]); s[tt][n][1] = fmaf(lo, part.r[1], s[tt][n][1]);
        s[tt][n][2] = fmaf(hi, part.r[2], s[tt][n][2]); s[tt][n][3] = fmaf(hi, part.r[3], s[tt][n][3]);
      }
    }
  }
}

// Scores of 64 tokens: s[tile][n][e] in the layout of an mma's result, times log2(e). s_q: [8 kN columns][kQPitch].
template <int kN>
EXL_DEVICE void score_page(float (&s)[4][kN][4], const u8* page, const half* s_q, int lane, float scale, float softcap) {
  EXL_UNROLL
  for (int i = 0; i < 16 * kN; ++i) s[i / 4 / kN][i / 4 % kN][i % 4] = 0.0f;
  EXL_NO_UNROLL   // unrolled, the compiler would load all of K at once and run out of registers
  for (int tile = 0; tile < kD / 64; ++tile) score_tile<true>(s, page, s_q, tile, lane);
  if constexpr (kD % 64 != 0) score_tile<false>(s, page, s_q, kD / 64, lane);
  EXL_UNROLL
  for (int i = 0; i < 16 * kN; ++i) {
    float& score = s[i / 4 / kN][i / 4 % kN][i % 4];
    score = log2_score(score, scale, softcap);
  }
}

// Turns the scores of 8 columns into probabilities, as the B operands of four mma, and updates a's maximum, sum and O.
template <int kN>
EXL_DEVICE void weigh(FragB (&p)[4], Attended<kN>& a, int n, const float (&s)[4][kN][4], int start, const Question (&q)[2], int lane) {
  const int g = lane / 4;
  u32 seen = 0;   // bit 4 tile + e: that score's token is visible to its column
  float m[2] = {a.m[n][0], a.m[n][1]};
  EXL_UNROLL
  for (int i = 0; i < 16; ++i) {
    const int token = start + i / 4 * 16 + g + 8 * (i % 4 / 2);
    if (token < q[i % 2].first || token > q[i % 2].last) continue;
    seen |= 1u << i;
    m[i % 2] = fmaxf(m[i % 2], s[i / 4][n][i % 4]);
  }
  EXL_UNROLL
  for (int e = 0; e < 2; ++e) {
    EXL_UNROLL
    for (int d = 4; d < 32; d *= 2) m[e] = fmaxf(m[e], __shfl_xor_sync(0xffffffffu, m[e], d));
    const float factor = ex2_approx(a.m[n][e] - m[e]);
    a.m[n][e] = m[e];
    a.l[n][e] *= factor;
    EXL_UNROLL
    for (int c = 0; c < kTiles; ++c) { a.o[n][c].r[e] *= factor; a.o[n][c].r[e + 2] *= factor; }
  }
  EXL_UNROLL
  for (int j = 0; j < 4; ++j) {
    float v[4];
    EXL_UNROLL
    for (int e = 0; e < 4; ++e) {
      v[e] = seen >> (4 * j + e) & 1u ? ex2_approx(s[j][n][e] - m[e % 2] + kLift) : 0.0f;
      a.l[n][e % 2] += v[e];
    }
    p[j].r[0] = movmatrix_trans(cvt_f16x2_f32(v[0], v[1]));
    p[j].r[1] = movmatrix_trans(cvt_f16x2_f32(v[2], v[3]));
  }
}

// Adds one page to a warp's columns. `start`: the page's first token; `length`: tokens of the sequence, beyond which the
// page's bytes are undefined.
template <int kN>
EXL_DEVICE void attend_page(Attended<kN>& a, const u8* page, int start, const half* s_q, const Question (&q)[kN][2], int length,
                            int lane, float scale, float softcap) {
  const int t = lane % 4;
  float s[4][kN][4];
  score_page<kN>(s, page, s_q, lane, scale, softcap);
  FragB p[kN][4];
  EXL_UNROLL
  for (int n = 0; n < kN; ++n) weigh<kN>(p[n], a, n, s, start, q[n], lane);
  u32 real[4][2];   // masks of this lane's tokens of V: NaN in bytes that were never written must not spread
  EXL_UNROLL
  for (int j = 0; j < 4; ++j)
    EXL_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int left = length - (start + 16 * j + 8 * i + 2 * t);
      real[j][i] = left >= 2 ? 0xffffffffu : left == 1 ? 0x0000ffffu : 0u;
    }
  EXL_UNROLL
  for (int c = 0; c < kTiles; ++c) {
    Tile<kVBits> v;
    const u8* at = page + kVCodesAt + c * (128 * kVBits);
    if (c < kD / 16) v.load(at, lane);
    else v.load_eight(at, lane);
    EXL_UNROLL
    for (int j = 0; j < 4; ++j) {
      FragA codes = v.of_v(j);
      uint2 scales = make_uint2(0, 0);
      if constexpr (kQuantized) {
        scales = *reinterpret_cast<const uint2*>(page + v_scale_at(16 * j + 2 * t, c / 2));
        scales.x &= real[j][0]; scales.y &= real[j][1];
      } else {
        codes.r[0] &= real[j][0]; codes.r[1] &= real[j][0]; codes.r[2] &= real[j][1]; codes.r[3] &= real[j][1];
      }
      EXL_UNROLL
      for (int n = 0; n < kN; ++n) {
        FragB weights = p[n][j];
        if constexpr (kQuantized)   // saturated: infinity times a code of 0 would be NaN
          weights = FragB{{finite_f16x2(mul_f16x2(weights.r[0], scales.x)), finite_f16x2(mul_f16x2(weights.r[1], scales.y))}};
        mma_m16n8k16(a.o[n][c], codes, weights);
      }
    }
  }
}

// Sum over the 8 lanes that hold the same columns.
EXL_DEVICE float sum_over_rows(float l) {
  EXL_UNROLL
  for (int d = 4; d < 32; d *= 2) l += __shfl_xor_sync(0xffffffffu, l, d);
  return l;
}
