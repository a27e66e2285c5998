#pragma once
// attend.cuh for GPUs without tensor cores (sm_60 to sm_72): the same pages and the same softmax in f32 arithmetic, for
// up to 8 columns per warp. Lanes read the pages as in attend.cuh, 16 adjacent bytes each: lane 4 g + t multiplies its own
// codes of rows g and g + 8, and the four lanes of a quad add their sums. q, probabilities and O are in shared memory. The
// code is compiled for kC = 1, 2, 4 and 8 columns, so that few columns cost less; a column's bits do not depend on kC.
//
// Macros: page.cuh.
#include <exl/attend.cuh>
#include <exl/head_row.cuh>

struct SimtWarp {   // a warp's shared memory, f32; q may belong to the whole block
  const float* q;   // [8][kSimtPitch], zero beyond kD
  float* o;         // [8][kD]
  float* p;         // [8][64]
};
constexpr int kSimtPitch = kRuns * 32, kSimtProbabilities = 8 * kPageTokens;

struct SimtSums {   // maximum and sum of column `lane`, in lanes 0 to 7
  float m, l;
};

// code - zero: code + 2^23 as a float is exact, and so is the difference. Cheaper than an integer conversion.
EXL_DEVICE float signed_code(u32 code, int zero) { return __uint_as_float(0x4b000000u | code) - static_cast<float>((1 << 23) + zero); }
EXL_DEVICE float half_of(u32 pair, int high) { return __half2float(__ushort_as_half(static_cast<u16>(pair >> 16 * high))); }

// K's value at channel i of this lane's unit of run h, row g + 8 r.
template <int kBits> EXL_DEVICE float k_value(const Tile<kBits>& k, int h, int r, int i) {
  if constexpr (kBits == 4) return signed_code(k.w[2 * h + r] >> (4 * (i / 2) + 16 * (i % 2)) & 15u, 8);
  else if constexpr (kBits == 8) return signed_code(k.w[4 * h + 2 * r + i / 4] >> 8 * (i % 4) & 255u, 128);
  else return half_of(k.w[8 * h + 4 * r + i / 2], i % 2);
}
// V's value at channel g + 8 r, token 16 j + 2 t + {0, 1, 8, 9}[place].
template <int kBits> EXL_DEVICE float v_value(const Tile<kBits>& v, int j, int r, int place) {
  if constexpr (kBits == 4) return signed_code(v.w[j] >> ((place == 0 ? 0 : place == 1 ? 16 : place == 2 ? 8 : 24) + 4 * r) & 15u, 8);
  else if constexpr (kBits == 8) return signed_code(v.w[2 * j + r] >> 8 * place & 255u, 128);
  else return half_of(v.w[4 * j + r + 2 * (place / 2)], place % 2);
}

// Sums over the four lanes of a quad: lane t gets those of columns 2t and 2t + 1, if they are below kC. For every kC, lanes
// two apart are added first, then neighbours, so that the bits agree.
template <int kC> EXL_DEVICE void sum_quad(float (&sum)[2], const float (&x)[kC], int t) {
  constexpr int kLeft = kC == 8 ? 4 : kC;
  float y[kLeft];
  EXL_UNROLL
  for (int i = 0; i < kLeft; ++i) {
    const float mine = kC == 8 && (t & 2) ? x[(i + 4) % kC] : x[i], other = kC == 8 && !(t & 2) ? x[(i + 4) % kC] : x[i];
    y[i] = mine + __shfl_xor_sync(kWarp, other, 2);
  }
  EXL_UNROLL
  for (int i = 0; i < (kLeft < 2 ? kLeft : 2); ++i) {
    const float mine = kLeft == 4 && (t & 1) ? y[(i + 2) % kLeft] : y[i], other = kLeft == 4 && !(t & 1) ? y[(i + 2) % kLeft] : y[i];
    sum[i] = mine + __shfl_xor_sync(kWarp, other, 1);
  }
}

// Writes the scores of 64 tokens, times log2(e), to p.
template <int kC> EXL_DEVICE void score_page_simt(const SimtWarp& s, const u8* page, int lane, float scale, float softcap) {
  const int g = lane / 4, t = lane % 4;
  EXL_NO_UNROLL
  for (int tt = 0; tt < 4; ++tt) {
    float acc[2][kC] = {};
    EXL_NO_UNROLL
    for (int tile = 0; tile < (kD + 63) / 64; ++tile) {
      Tile<kKBits> k;
      const u8* at = page + tt * (2 * kD * kKBits) + tile * (128 * kKBits);
      if (tile < kD / 64) k.load(at, lane);
      else k.load_part(at, g, t);
      EXL_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int run = tile * 2 + h;
        if (run >= kRuns) continue;
        float lo = 1.0f, hi = 1.0f;
        if constexpr (kQuantized) {
          const half2 pair = bits_half2(*reinterpret_cast<const u32*>(page + k_scale_at(tt * 16 + g, run)));
          lo = __low2float(pair); hi = __high2float(pair);
        }
        float x[2][8];
        EXL_UNROLL
        for (int i = 0; i < 8; ++i) { x[0][i] = k_value(k, h, 0, i); x[1][i] = k_value(k, h, 1, i); }
        EXL_UNROLL
        for (int c = 0; c < kC; ++c) {
          const float4* from = reinterpret_cast<const float4*>(s.q + c * kSimtPitch + run * 32 + 8 * t);
          const float4 a = from[0], b = from[1];
          const float q[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
          float part[2] = {};
          EXL_UNROLL
          for (int i = 0; i < 8; ++i) { part[0] = fmaf(x[0][i], q[i], part[0]); part[1] = fmaf(x[1][i], q[i], part[1]); }
          acc[0][c] = fmaf(lo, part[0], acc[0][c]);
          acc[1][c] = fmaf(hi, part[1], acc[1][c]);
        }
      }
    }
    EXL_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum[2] = {};
      sum_quad<kC>(sum, acc[r], t);
      EXL_UNROLL
      for (int e = 0; e < 2; ++e)
        if (2 * t + e < kC) s.p[(2 * t + e) * kPageTokens + tt * 16 + g + 8 * r] = log2_score(sum[e], scale, softcap);
    }
  }
  __syncwarp();
}

// Turns column c's scores into probabilities, in place. Returns the factor that rescales its earlier sums.
EXL_DEVICE float weigh_simt(SimtSums& sums, float* p, int c, int start, Question q, int lane) {
  const float old = __shfl_sync(kWarp, sums.m, c);
  float x[2], m = old;
  EXL_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int token = start + lane + 32 * i;
    x[i] = token >= q.first && token <= q.last ? p[lane + 32 * i] : kNone;   // a token that is not seen may hold NaN
    m = fmaxf(m, x[i]);
  }
  EXL_UNROLL
  for (int d = 16; d > 0; d /= 2) m = fmaxf(m, __shfl_xor_sync(kWarp, m, d));
  EXL_UNROLL
  for (int i = 0; i < 2; ++i) {
    x[i] = x[i] > kNone ? ex2_approx(x[i] - m) : 0.0f;
    p[lane + 32 * i] = x[i];
  }
  const float factor = ex2_approx(old - m), sum = warp_sum(x[0] + x[1]);
  if (lane == c) sums = SimtSums{m, fmaf(sums.l, factor, sum)};
  return factor;
}

// Adds one page to a warp's columns; arguments as in attend_page.
template <int kC>
EXL_DEVICE void attend_page_simt(SimtSums& sums, const SimtWarp& s, const u8* page, int start, const Columns& columns, int length,
                                 int lane, float scale, float softcap) {
  const int g = lane / 4, t = lane % 4;
  score_page_simt<kC>(s, page, lane, scale, softcap);
  float factor[2] = {};   // of columns 2t and 2t + 1
  EXL_NO_UNROLL
  for (int c = 0; c < kC; ++c) {
    const float f = weigh_simt(sums, s.p + c * kPageTokens, c, start, columns.question(c), lane);
    if (c == 2 * t) factor[0] = f;
    if (c == 2 * t + 1) factor[1] = f;
  }
  __syncwarp();
  EXL_NO_UNROLL
  for (int tile = 0; tile < kTiles; ++tile) {
    Tile<kVBits> v;
    const u8* at = page + kVCodesAt + tile * (128 * kVBits);
    if (tile < kD / 16) v.load(at, lane);
    else v.load_eight(at, lane);
    float acc[2][kC] = {};
    EXL_UNROLL
    for (int j = 0; j < 4; ++j) {
      uint2 scales = make_uint2(0, 0);
      if constexpr (kQuantized) scales = *reinterpret_cast<const uint2*>(page + v_scale_at(16 * j + 2 * t, tile / 2));
      float x[2][4];
      EXL_UNROLL
      for (int place = 0; place < 4; ++place) {
        const bool real = start + 16 * j + 2 * t + place % 2 + 8 * (place / 2) < length;   // beyond `length` it may hold NaN
        const float factor_of_v = kQuantized ? half_of(place < 2 ? scales.x : scales.y, place % 2) : 1.0f;
        EXL_UNROLL
        for (int r = 0; r < 2; ++r) x[r][place] = real ? v_value(v, j, r, place) * factor_of_v : 0.0f;
      }
      EXL_UNROLL
      for (int c = 0; c < kC; ++c) {
        const float* p = s.p + c * kPageTokens + 16 * j + 2 * t;
        const float2 a = *reinterpret_cast<const float2*>(p), b = *reinterpret_cast<const float2*>(p + 8);
        EXL_UNROLL
        for (int r = 0; r < 2; ++r)
          acc[r][c] = fmaf(x[r][3], b.y, fmaf(x[r][2], b.x, fmaf(x[r][1], a.y, fmaf(x[r][0], a.x, acc[r][c]))));
      }
    }
    EXL_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum[2] = {};
      sum_quad<kC>(sum, acc[r], t);
      const int channel = tile * 16 + g + 8 * r;
      EXL_UNROLL
      for (int e = 0; e < 2; ++e)
        if (2 * t + e < kC && channel < kD) {
          float* o = s.o + (2 * t + e) * kD + channel;
          *o = fmaf(*o, factor[e], sum[e]);
        }
    }
  }
  __syncwarp();   // the next page writes p
}

// Calls the variant for columns.count columns.
EXL_DEVICE void attend_page_simt(SimtSums& sums, const SimtWarp& s, const u8* page, int start, const Columns& columns, int length,
                                 int lane, float scale, float softcap) {
  if (columns.count == 1) attend_page_simt<1>(sums, s, page, start, columns, length, lane, scale, softcap);
  else if (columns.count == 2) attend_page_simt<2>(sums, s, page, start, columns, length, lane, scale, softcap);
  else if (columns.count <= 4) attend_page_simt<4>(sums, s, page, start, columns, length, lane, scale, softcap);
  else attend_page_simt<8>(sums, s, page, start, columns, length, lane, scale, softcap);
}
