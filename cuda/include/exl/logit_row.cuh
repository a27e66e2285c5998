#pragma once
// How the sampler reads a row of logits: as integer keys in the order of drawing, and as integer weights; tokens that a mask
// forbids as -inf, and tokens that an adjustment changes with their changed logit.
//
// A weight is exp((logit - largest) / temperature) in units of 2^-44, computed with integers and with f32 operations that
// IEEE 754 defines, so it is the same on every machine. Sums of weights are exact: they depend neither on the order of
// adding nor on the number of blocks. A weight is less than one unit off: 0.5 by rounding to whole units, 0.19 by the
// exponent's error (see weight_of), 0.01 by the polynomial. 2^19 tokens weigh at most 2^63.
#include <exl/platform.cuh>

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kPart = 4096;      // tokens of a row that one block reads: a constant, so that the grid depends only on R and V
constexpr int kIdBits = 19;      // V is at most 2^19
constexpr u32 kMaxId = (1u << kIdBits) - 1;
constexpr int kUnitBits = 44;
constexpr float kOctaves = 45.0f;   // 2^-45 and less has weight 0

// ---- order ---------------------------------------------------------------------------------------------------------

// Keys have the order of the logits. -0 and 0 have the same key; NaN has the highest key.
constexpr u32 kKeyMinusInfinity = 0x007fffffu, kKeyInfinity = 0xff800000u, kKeyNan = 0xffffffffu;

EXL_DEVICE u32 key_of(float v) {
  const u32 bits = __float_as_uint(v);
  if (v != v) return kKeyNan;
  if (bits == 0x80000000u) return bits;
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
EXL_DEVICE float value_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key); }

// Position in the order of drawing, as a sortable integer: descending logits, ties by lower id.
EXL_DEVICE u64 order_of(u32 key, u32 id) { return (static_cast<u64>(~key) << kIdBits) | id; }
EXL_DEVICE u32 key_in(u64 order) { return ~static_cast<u32>(order >> kIdBits); }

// ---- a row ---------------------------------------------------------------------------------------------------------

// What is asked for one token of a row: SamplingBatch of exl/batch.py says where each number comes from.
struct alignas(16) Adjustment {
  i32 id;
  float bias, factor, subtract;
};
EXL_DEVICE float adjusted(float v, const Adjustment& a) {
  v += a.bias;
  v = v < 0.0f ? v * a.factor : v / a.factor;
  return v - a.subtract;
}

// 32 tokens: which of them are adjusted, and the first one's place among all adjustments.
struct alignas(8) Word {
  u32 bits, first;
};

struct Row {
  const float* logits;
  const u32* mask;       // bit i % 32 of word i / 32 is set if token i is allowed; null: all are
  const Word* words;     // of the tokens from words_start on; null: none is adjusted
  const float* values;   // adjusted logits, by place
  int words_start, V;
};

EXL_DEVICE float logit_of(const Row& row, float v, int id) {
  if (row.mask != nullptr && !(row.mask[id / 32] >> (id % 32) & 1u)) return value_of(kKeyMinusInfinity);
  if (row.words == nullptr) return v;
  const u32 at = static_cast<u32>(id - row.words_start), bit = at % 32;
  const Word word = row.words[at / 32];
  if (!(word.bits >> bit & 1u)) return v;
  return row.values[word.first + static_cast<u32>(__popc(word.bits & ((1u << bit) - 1)))];
}

// Calls visit(id, logit) for the tokens [start, stop) of the row, spread over the block's threads, with kQuads 16-byte loads
// in flight per thread. If V % 4 != 0, rows are not aligned to 16 bytes: a partial quad at either end is read by element.
template <int kQuads, class Visit> EXL_DEVICE void for_each(const Row& row, int start, int stop, Visit visit) {
  const int shift = static_cast<int>(reinterpret_cast<size_t>(row.logits) / 4 % 4);   // quad q begins with token 4 q - shift
  const int end = (stop + shift + 3) / 4;
  for (int q0 = (start + shift) / 4 + static_cast<int>(threadIdx.x); q0 < end; q0 += kThreads * kQuads) {
    float v[kQuads][4];
    EXL_UNROLL
    for (int i = 0; i < kQuads; ++i) {
      const int id = 4 * (q0 + i * kThreads) - shift;
      if (id >= start && id + 4 <= stop) {
        const float4 quad = *reinterpret_cast<const float4*>(row.logits + id);
        v[i][0] = quad.x, v[i][1] = quad.y, v[i][2] = quad.z, v[i][3] = quad.w;
      } else {
        EXL_UNROLL
        for (int j = 0; j < 4; ++j) v[i][j] = id + j >= start && id + j < stop ? row.logits[id + j] : 0.0f;
      }
    }
    EXL_UNROLL
    for (int i = 0; i < kQuads; ++i) {
      EXL_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int id = 4 * (q0 + i * kThreads) - shift + j;
        if (id >= start && id < stop) visit(id, logit_of(row, v[i][j], id));
      }
    }
  }
}

// ---- weights -------------------------------------------------------------------------------------------------------

EXL_DEVICE u64 mul_high(u64 a, u64 b) {   // the upper half of the product
  const u64 a0 = static_cast<u32>(a), a1 = a >> 32, b0 = static_cast<u32>(b), b1 = b >> 32;
  const u64 low = a1 * b0 + (a0 * b0 >> 32), high = a0 * b1 + static_cast<u32>(low);
  return a1 * b1 + (low >> 32) + (high >> 32);
}

struct Scale {
  float top;       // the row's largest logit
  float hi, lo;    // log2(e) / temperature = hi + lo
};

// log2 of the largest weight over this token's, rounded. Monotone: a lower logit never gives fewer octaves. Infinite for a
// forbidden token.
EXL_DEVICE float octaves_of(const Scale& s, float v) { return (s.top - v) * s.hi; }

// 2^(44 - y) to the nearest integer, with y = (top - v) (hi + lo) as a sum of two floats. y is off by at most 2^-45 y:
// 2^-49 y because lo is rounded, 2^-48 y for the product rest * lo that is left out, 2^-47 y and 1.5 * 2^-47 y for the
// roundings of the last two fmaf.
EXL_DEVICE u64 weight_of(const Scale& s, float v) {
  const float p = octaves_of(s, v);
  if (!(p < kOctaves)) return 0;
  const float d = s.top - v, back = d - s.top;
  const float rest = (s.top - (d - back)) - (v + back);   // d + rest is the difference (Knuth's two-sum)
  float e = fmaf(d, s.hi, -p);
  e = fmaf(d, s.lo, e);
  e = fmaf(rest, s.hi, e);
  const i64 y = static_cast<i64>(p * 0x1p57f) + static_cast<i64>(e * 0x1p57f);
  const int whole = static_cast<int>(y >> 57);
  if (whole > kUnitBits) return 0;
  const u64 f = static_cast<u64>(y) << 7;   // fraction of y, times 2^64
  // 2^-f = 1 - f (c1 - f (c2 - ...)), interpolated at the Chebyshev nodes of [0, 1]: off by at most 2^-50.5, exact at 0.
  u64 c = 0x162bc56dc1ull;
  c = 0x1a4ceed1065ull - mul_high(f, c);
  c = 0x16194fd835a9ull - mul_high(f, c);
  c = 0xffd8e9b04581ull - mul_high(f, c);
  c = 0xa1842e560e8dbull - mul_high(f, c);
  c = 0x5761fe1a260cf1ull - mul_high(f, c);
  c = 0x276556dbbdc364eull - mul_high(f, c);
  c = 0xe35846b7daf294aull - mul_high(f, c);
  c = 0x3d7f7bff056740a8ull - mul_high(f, c);
  c = 0xb17217f7d1cf4bc8ull - mul_high(f, c);
  const u64 power = (1ull << 63) - (mul_high(f, c) >> 1);   // 2^(63 - f)
  const int drop = 63 - kUnitBits + whole;
  return (power + (1ull << (drop - 1))) >> drop;
}
