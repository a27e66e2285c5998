#pragma once
// A page of the KV cache, 64 tokens of one kv head: [K codes | K scales | V codes | V scales], in the order of
// exl/kernels/page_layout.py, which explains it. Lane l = 4 g + t of a warp reads its own bytes and gets operand A.
//
// Macros: EXL_HEAD_DIM, a multiple of 16 to 256; EXL_K_BITS, EXL_V_BITS 4|8|16 (16: f16, without scales).
#include <exl/half.cuh>

constexpr int kD = EXL_HEAD_DIM, kKBits = EXL_K_BITS, kVBits = EXL_V_BITS;
constexpr bool kQuantized = kKBits < 16;
constexpr int kPageTokens = 64;
constexpr int kGroups = (kD + 31) / 32;                            // of 32 channels, with a scale each
constexpr int kKTileBytes = 16 * kD * kKBits / 8;                  // 16 tokens
constexpr int kVTileBytes = 16 * kPageTokens * kVBits / 8;         // 16 channels
constexpr int kScaleBytes = kQuantized ? kPageTokens * kGroups * 2 : 0;
constexpr int kKScalesAt = 4 * kKTileBytes, kVCodesAt = kKScalesAt + kScaleBytes;
constexpr int kVScalesAt = kVCodesAt + kD / 16 * kVTileBytes, kPageBytes = kVScalesAt + kScaleBytes;
constexpr int kRotation = kQuantized ? kD & -kD : 1;               // channels of a Hadamard block

// ---- places of one token's bytes ----------------------------------------------------------------------------------

// Byte of a channel of K: of its code (4 bits: which half of it k_code_high says) or of its half.
EXL_DEVICE int k_code_at(int token, int channel) {
  const int g = token % 8, r = token / 8 % 2, h = channel / 32 % 2, t = channel / 8 % 4, i = channel % 8;
  const int in_lane = (2 * h + r) * kKBits;                        // a unit of 8 channels has kKBits bytes
  const int inside = kKBits == 16 ? 2 * i : kKBits == 8 ? i : i / 4 + 2 * (i % 2);
  const int tile = token / 16 * kKTileBytes + channel / 64 * (128 * kKBits);
  if (channel / 64 < kD / 64) return tile + in_lane / 16 * 512 + (4 * g + t) * 16 + in_lane % 16 + inside;
  return tile + ((channel % 64 / 8 * 8 + g) * 2 + r) * kKBits + inside;
}
EXL_DEVICE bool k_code_high(int channel) { return channel / 2 % 2; }
EXL_DEVICE int k_scale_at(int token, int group) {
  return kKScalesAt + 2 * (((token / 16 * 8 + token % 8) * kGroups + group) * 2 + token / 8 % 2);
}

// The same of V; 4 bits: channels c (c % 16 < 8) and c + 8 share a byte, c in its low half.
EXL_DEVICE int v_code_at(int token, int channel) {
  const int lane = 4 * (channel % 8) + token / 2 % 4, r = channel / 8 % 2, j = token / 16;
  const int place = token % 2 + 2 * (token / 8 % 2);
  const int word = kVBits == 16 ? 4 * j + r + 2 * (place / 2) : kVBits == 8 ? 2 * j + r : j;
  const int byte = kVBits == 16 ? place % 2 * 2 : kVBits == 8 ? place : place / 2 + place % 2 * 2;
  return kVCodesAt + channel / 16 * kVTileBytes + word / 4 * 512 + lane * 16 + word % 4 * 4 + byte;
}
EXL_DEVICE int v_scale_at(int token, int group) {
  const int place = token % 2 + 2 * (token / 8 % 2);
  return kVScalesAt + 2 * (((group * 4 + token / 2 % 4) * 4 + token / 16) * 4 + place);
}

// ---- operands ------------------------------------------------------------------------------------------------------

// Codes of 32 channels of 16 tokens: a lane's words, `kKBits / 4` of row g and as many of row g + 8.
struct KWords { u32 w[kKBits / 2]; };

// Run `run` (32 channels) of token tile `tile`. Channels past the head are zero words, and must meet zeros in q.
EXL_DEVICE void load_k(KWords& out, const u8* page, int tile, int run, int lane) {
  constexpr int kWords = kKBits / 4;                               // of one unit
  const int g = lane / 4, t = lane % 4, c = run / 2, h = run % 2;
  const u8* at = page + tile * kKTileBytes + c * (128 * kKBits);
  const bool whole = c < kD / 64, there = whole || h * 4 + t < kD % 64 / 8;
  EXL_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int in_lane = (2 * h + r) * kKBits;
    const u8* unit = at + (whole ? in_lane / 16 * 512 + lane * 16 + in_lane % 16 : (((h * 4 + t) * 8 + g) * 2 + r) * kKBits);
    if constexpr (kKBits == 16) {
      const uint4 v = there ? *reinterpret_cast<const uint4*>(unit) : make_uint4(0, 0, 0, 0);
      out.w[r * kWords] = v.x; out.w[r * kWords + 1] = v.y; out.w[r * kWords + 2] = v.z; out.w[r * kWords + 3] = v.w;
    } else {
      EXL_UNROLL
      for (int i = 0; i < kWords; ++i) out.w[r * kWords + i] = there ? reinterpret_cast<const u32*>(unit)[i] : 0u;
    }
  }
}

// Exact halves from codes: 1024 + code sits in the mantissa, one subtraction takes the offset away (dequant.cuh).
EXL_DEVICE u32 low_nibbles(u32 w) { return sub_f16x2(lop3<0xea>(w, 0x000f000fu, 0x64006400u), 0x64086408u); }
EXL_DEVICE u32 high_nibbles(u32 w) {                               // fma by 1/16: 64 + code - 72
  return fma_f16x2(lop3<0xea>(w, 0x00f000f0u, 0x64006400u), 0x2c002c00u, 0xd480d480u);
}
EXL_DEVICE u32 low_bytes(u32 w) { return sub_f16x2(prmt(w, 0x64646464u, 0x4140u), 0x64806480u); }
EXL_DEVICE u32 high_bytes(u32 w) { return sub_f16x2(prmt(w, 0x64646464u, 0x4342u), 0x64806480u); }

// The mma j = 0, 1 of a run: lane t's channels 8t + 4j .. 8t + 4j + 3.
EXL_DEVICE FragA k_fragment(const KWords& k, int j) {
  FragA a;
  EXL_UNROLL
  for (int r = 0; r < 2; ++r) {
    const u32* w = k.w + r * (kKBits / 4);
    if constexpr (kKBits == 16) {
      a.r[r] = w[2 * j];
      a.r[r + 2] = w[2 * j + 1];
    } else if constexpr (kKBits == 8) {
      a.r[r] = low_bytes(w[j]);
      a.r[r + 2] = high_bytes(w[j]);
    } else {
      const u32 v = w[0] >> (8 * j);
      a.r[r] = low_nibbles(v);
      a.r[r + 2] = high_nibbles(v);
    }
  }
  return a;
}

// Scales of rows g (low half) and g + 8 of token tile `tile`.
EXL_DEVICE u32 load_k_scale(const u8* page, int tile, int group, int lane) {
  return reinterpret_cast<const u32*>(page + kKScalesAt)[(tile * 8 + lane / 4) * kGroups + group];
}

// Codes of 16 channels of 64 tokens: a lane's words.
struct VWords { u32 w[kVBits]; };

EXL_DEVICE void load_v(VWords& out, const u8* page, int tile, int lane) {
  const uint4* at = reinterpret_cast<const uint4*>(page + kVCodesAt + tile * kVTileBytes) + lane;
  EXL_UNROLL
  for (int i = 0; i < kVBits / 4; ++i) {
    const uint4 v = at[32 * i];
    out.w[4 * i] = v.x; out.w[4 * i + 1] = v.y; out.w[4 * i + 2] = v.z; out.w[4 * i + 3] = v.w;
  }
}

// The mma j = 0..3 of a tile: rows are channels, columns tokens 16 j .. 16 j + 15.
EXL_DEVICE FragA v_fragment(const VWords& v, int j) {
  FragA a;
  if constexpr (kVBits == 16) {
    EXL_UNROLL
    for (int e = 0; e < 4; ++e) a.r[e] = v.w[4 * j + e];
  } else if constexpr (kVBits == 8) {
    EXL_UNROLL
    for (int r = 0; r < 2; ++r) { a.r[r] = low_bytes(v.w[2 * j + r]); a.r[r + 2] = high_bytes(v.w[2 * j + r]); }
  } else {
    const u32 lo = v.w[j], hi = lo >> 8;
    a.r[0] = low_nibbles(lo); a.r[1] = high_nibbles(lo); a.r[2] = low_nibbles(hi); a.r[3] = high_nibbles(hi);
  }
  return a;
}

// Scales of tokens 16 j + 2t, + 1 (x) and 16 j + 2t + 8, + 9 (y).
EXL_DEVICE uint2 load_v_scale(const u8* page, int group, int j, int lane) {
  return reinterpret_cast<const uint2*>(page + kVScalesAt)[(group * 4 + lane % 4) * 4 + j];
}
