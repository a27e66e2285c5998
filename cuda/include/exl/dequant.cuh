#pragma once
// Codes of 2, 3, 4 and 8 bits -> exact halves (code - zero) in the A operand of mma.m16n8k16.
//
// One trick serves all: or-ing a code into the mantissa of 1024.0 gives the half 1024 + code. A code that sits s bits
// higher gives 1024 + 2^s code; one fma by 2^-s brings it down. Every intermediate is an integer below 2048 times a
// power of two, so nothing is ever rounded.
//
// A lane's words of one stage, w[0..], hold blocks h of 64 inputs; within a block, j = 0..3 numbers the mma. A fragment
// is four pairs: pairs 0 and 2 belong to row g, pairs 1 and 3 to row g + 8 (exl/layout/tiles.py packs them).
#include <exl/ptx.cuh>

template <int kBits> struct Quant;

// `zero` takes the zero points of rows g and g + 8 as the packer stores them, in one byte (8-bit codes: two bytes),
// repeated in both halves of a word (8-bit codes: in the lower half only). It spreads them into the operands of
// `fragment`. kKnown: the zero points are those of a symmetric matrix, a constant that the compiler folds; it cannot fold
// lop3.
template <bool kKnown> EXL_DEVICE u32 spread(u32 zz, u32 mask, u32 more) {
  return kKnown ? (zz & mask) | more : lop3<0xea>(zz, mask, more);
}
struct ZeroPair { u32 lo, hi; };   // operands for rows g and g + 8, the same in both halves

template <> struct Quant<4> {
  static constexpr int kStageK = 128;   // inputs of one stage of the ring
  using Zero = ZeroPair;                // lo: 1024 + z of row g; hi: -(64 + z) of row g + 8
  template <bool kKnown> EXL_DEVICE static Zero zero(u32 zz) {
    return {spread<kKnown>(zz, 0x000f000fu, 0x64006400u), spread<kKnown>(zz, 0x00f000f0u, 0xd400d400u)};
  }
  EXL_DEVICE static FragA fragment(const u32* w, int h, int j, const Zero& z) {
    const u32 lo = w[h * 4 + j], hi = lo >> 8;
    FragA a;
    a.r[0] = sub_f16x2(lop3<0xea>(lo, 0x000f000fu, 0x64006400u), z.lo);
    a.r[1] = fma_f16x2(lop3<0xea>(lo, 0x00f000f0u, 0x64006400u), 0x2c002c00u, z.hi);   // * 1/16
    a.r[2] = sub_f16x2(lop3<0xea>(hi, 0x000f000fu, 0x64006400u), z.lo);
    a.r[3] = fma_f16x2(lop3<0xea>(hi, 0x00f000f0u, 0x64006400u), 0x2c002c00u, z.hi);
    return a;
  }
};

template <> struct Quant<8> {
  static constexpr int kStageK = 128;
  using Zero = ZeroPair;                // 1024 + z
  template <bool> EXL_DEVICE static Zero zero(u32 z) { return {prmt(z, 0x64u, 0x4040u), prmt(z, 0x64u, 0x4141u)}; }
  EXL_DEVICE static FragA fragment(const u32* w, int h, int j, const Zero& z) {
    const u32 w0 = w[h * 8 + j * 2], w1 = w[h * 8 + j * 2 + 1];
    FragA a;
    a.r[0] = sub_f16x2(prmt(w0, 0x64646464u, 0x4140u), z.lo);
    a.r[1] = sub_f16x2(prmt(w0, 0x64646464u, 0x4342u), z.hi);
    a.r[2] = sub_f16x2(prmt(w1, 0x64646464u, 0x4140u), z.lo);
    a.r[3] = sub_f16x2(prmt(w1, 0x64646464u, 0x4342u), z.hi);
    return a;
  }
};

template <> struct Quant<2> {
  static constexpr int kStageK = 256;
  struct Zero { u32 r[4]; };            // 1024 + z, -(256 + z), -(64 + z), -(16 + z): rows g, g + 8, g, g + 8
  template <bool kKnown> EXL_DEVICE static Zero zero(u32 zz) { // the byte holds both twice: g, g + 8, g, g + 8
    return {{spread<kKnown>(zz, 0x00030003u, 0x64006400u), spread<kKnown>(zz, 0x000c000cu, 0xdc00dc00u),
             spread<kKnown>(zz, 0x00300030u, 0xd400d400u), spread<kKnown>(zz, 0x00c000c0u, 0xcc00cc00u)}};
  }
  EXL_DEVICE static FragA fragment(const u32* w, int h, int j, const Zero& z) {
    const u32 v = j % 2 ? w[h * 2 + j / 2] >> 8 : w[h * 2 + j / 2];
    FragA a;
    a.r[0] = sub_f16x2(lop3<0xea>(v, 0x00030003u, 0x64006400u), z.r[0]);
    a.r[1] = fma_f16x2(lop3<0xea>(v, 0x000c000cu, 0x64006400u), 0x34003400u, z.r[1]);   // * 1/4
    a.r[2] = fma_f16x2(lop3<0xea>(v, 0x00300030u, 0x64006400u), 0x2c002c00u, z.r[2]);   // * 1/16
    a.r[3] = fma_f16x2(lop3<0xea>(v, 0x00c000c0u, 0x64006400u), 0x24002400u, z.r[3]);   // * 1/64
    return a;
  }
};

// 16 pairs (64 inputs) in three words: pair p < 15 is field p % 5 of word p / 5, fields at bits 0, 3, 6 and, after
// >> 9, 0 and 3; bit b of pair 15 is bit 15 of word b.
template <> struct Quant<3> {
  static constexpr int kStageK = 256;
  struct Zero { u32 at0[2], at3[2], at6[2]; };   // [row g, row g + 8] for a code at bit 0, 3, 6
  template <bool kKnown> EXL_DEVICE static Zero zero(u32 zz) {          // row g in bits 0..2, row g + 8 in bits 3..5
    return {{spread<kKnown>(zz, 0x00070007u, 0x64006400u), spread<kKnown>(zz >> 3, 0x00070007u, 0x64006400u)},
            {spread<kKnown>(zz << 3, 0x00380038u, 0xd800d800u), spread<kKnown>(zz, 0x00380038u, 0xd800d800u)},
            {spread<kKnown>(zz << 6, 0x01c001c0u, 0xcc00cc00u), spread<kKnown>(zz << 3, 0x01c001c0u, 0xcc00cc00u)}};
  }
  EXL_DEVICE static u32 pair(const u32* w, int p, const Zero& z) {
    const int row = p % 2, field = p % 5;
    if (p == 15) {
      const u32 low = lop3<0xea>(w[0] >> 15, 0x00010001u, 0x64006400u);
      const u32 mid = lop3<0xea>(w[1] >> 14, 0x00020002u, low);
      return sub_f16x2(lop3<0xea>(w[2] >> 13, 0x00040004u, mid), z.at0[row]);
    }
    const u32 v = field < 3 ? w[p / 5] : w[p / 5] >> 9;
    if (field % 3 == 0) return sub_f16x2(lop3<0xea>(v, 0x00070007u, 0x64006400u), z.at0[row]);
    if (field % 3 == 1) return fma_f16x2(lop3<0xea>(v, 0x00380038u, 0x64006400u), 0x30003000u, z.at3[row]);   // * 1/8
    return fma_f16x2(lop3<0xea>(v, 0x01c001c0u, 0x64006400u), 0x24002400u, z.at6[row]);                       // * 1/64
  }
  EXL_DEVICE static FragA fragment(const u32* w, int h, int j, const Zero& z) {
    FragA a;
    EXL_UNROLL
    for (int e = 0; e < 4; ++e) a.r[e] = pair(w + h * 3, j * 4 + e, z);
    return a;
  }
};
