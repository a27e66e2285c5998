#pragma once
// Warp-wide instructions: a lane stores its operands and sleeps; the last lane to arrive computes for all.
#include "numbers.hpp"
#include "scheduler.hpp"

namespace exl_host {

inline const char* op_name(Op op) {
  static const char* const names[] = {"__syncwarp", "shuffle", "vote",     "match",
                                      "reduce",     "mma",     "ldmatrix", "movmatrix"};
  return names[static_cast<int>(op)];
}

// ---- the instructions, from the lane maps of the PTX ISA -----------------------------------------------------------

// Tensor cores truncate their sums instead of rounding (Fasi et al., "Numerical behavior of NVIDIA tensor cores", 2021).
inline float toward_zero(double d) {
  float f = static_cast<float>(d);
  if (__builtin_isnan(f)) return __builtin_nanf("");
  if (!__builtin_isinf(f) && __builtin_fabs(static_cast<double>(f)) > __builtin_fabs(d)) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    --bits;
    memcpy(&f, &bits, 4);
  }
  return f;
}

// Element e of a lane's fragment: A [16, K] row (l / 4) + 8 (e / 2 % 2), column 2 (l % 4) + e % 2 + 8 (e / 4);
// B [K, 8] row 2 (l % 4) + e % 2 + 8 (e / 2), column l / 4; C [16, 8] row l / 4 + 8 (e / 2), column 2 (l % 4) + e % 2.
inline void mma(Lane* warp, uint32_t kind) {
  const int depth = kind == 2 ? 8 : 16;
  const int step = EXL_ARCH < 80 ? 4 : EXL_ARCH < 90 ? 8 : 16;  // products added in one step of the hardware
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    uint16_t h[12];
    float f[12];
    memcpy(h, warp[l].collective.in, sizeof h);
    if (kind == 1) {
      for (int e = 0; e < 12; ++e) f[e] = bfloat_to_float(h[e]);
    } else {
      halves_to_floats(h, f, 8);
      halves_to_floats(h + 8, f + 8, 4);
    }
    const int g = l / 4, t = l % 4;
    for (int e = 0; e < depth / 2; ++e) a[g + 8 * (e / 2 % 2)][2 * t + e % 2 + 8 * (e / 4)] = f[e];
    for (int e = 0; e < depth / 4; ++e) b[2 * t + e % 2 + 8 * (e / 2)][g] = f[8 + e];
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8];
    for (int col = 0; col < 8; ++col) sum[col] = warp[row % 8 * 4 + col / 2].collective.c[row / 8 * 2 + col % 2];
    for (int k0 = 0; k0 < depth; k0 += step) {
      double exact[8];
      for (int col = 0; col < 8; ++col) exact[col] = sum[col];
      for (int k = k0; k < k0 + step; ++k)
        for (int col = 0; col < 8; ++col) exact[col] += static_cast<double>(a[row][k]) * b[k][col];
      for (int col = 0; col < 8; ++col) sum[col] = toward_zero(exact[col]);
    }
    for (int col = 0; col < 8; ++col)
      memcpy(&warp[row % 8 * 4 + col / 2].collective.out[row / 8 * 2 + col % 2], &sum[col], 4);
  }
}

// Lane l gets two elements of each matrix. This counts as a read by lane l, whichever lane gave the address.
inline void ldmatrix(Lane* warp, uint32_t first_lane, uint32_t count, bool transposed) {
  for (uint32_t m = 0; m < count; ++m) {
    for (uint32_t r = 0; r < 8; ++r) {
      const Collective& from = warp[m * 8 + r].collective;
      if (!in_shared_arena(from.row))
        fail(warp[m * 8 + r].site, nullptr, "ldmatrix of memory that is not shared, at {0}");
      if (reinterpret_cast<uintptr_t>(from.row) % 16)
        fail(warp[m * 8 + r].site, nullptr, "ldmatrix of a row that is not aligned to 16 bytes, at {0}");
    }
    for (uint32_t l = 0; l < 32; ++l) {
      uint32_t word = 0;
      for (uint32_t e = 0; e < 2; ++e) {
        const uint32_t row = transposed ? 2 * (l % 4) + e : l / 4, col = transposed ? l / 4 : 2 * (l % 4) + e;
        const uint8_t* p = static_cast<const uint8_t*>(warp[m * 8 + row].collective.row) + 2 * col;
        shadow_access(first_lane + l, p, 2, Access::kRead, warp[l].site);
        uint16_t bits;
        memcpy(&bits, p, 2);
        word |= static_cast<uint32_t>(bits) << (16 * e);
      }
      warp[l].collective.out[m] = word;
    }
  }
}

inline void movmatrix(Lane* warp) {
  for (uint32_t l = 0; l < 32; ++l) {
    uint32_t word = 0;
    for (uint32_t e = 0; e < 2; ++e) {  // element (g, 2t + e) of the result is (2t + e, g) of the operand
      const uint32_t row = 2 * (l % 4) + e, col = l / 4;
      word |= (warp[row * 4 + col / 2].collective.in[0] >> (16 * (col % 2)) & 0xffff) << (16 * e);
    }
    warp[l].collective.out[0] = word;
  }
}

// PTX "shfl.sync": lanes are cut into segments of `width`; a source outside of the segment leaves the lane's own value.
inline void shuffle(Lane* warp, uint32_t mask, uint32_t mode, uint32_t width) {
  for (uint32_t l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    Collective& self = warp[l].collective;
    const uint32_t operand = self.in[2], start = l & ~(width - 1);
    uint32_t source = l;
    if (mode == 0) source = start + (operand & (width - 1));
    if (mode == 1) source = l >= start + operand && operand < width ? l - operand : l;
    if (mode == 2) source = operand < width && l + operand < start + width ? l + operand : l;
    if (mode == 3) source = (l ^ (operand & 31)) < start + width ? l ^ (operand & 31) : l;
    if (!(mask >> source & 1))
      fail(warp[l].site, nullptr, "shuffle at {0}: lane %u reads lane %u, which is not in the mask 0x%08x", l, source,
           mask);
    self.out[0] = warp[source].collective.in[0];
    self.out[1] = warp[source].collective.in[1];
  }
}

inline void vote(Lane* warp, uint32_t mask, uint32_t kind) {
  uint32_t ballot = 0;
  for (uint32_t l = 0; l < 32; ++l)
    if ((mask >> l & 1) && warp[l].collective.in[0]) ballot |= 1u << l;
  for (uint32_t l = 0; l < 32; ++l)
    if (mask >> l & 1) warp[l].collective.out[0] = kind == 0 ? ballot : kind == 1 ? ballot == mask : ballot != 0;
}

inline void match(Lane* warp, uint32_t mask, bool all) {
  for (uint32_t l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    uint32_t same = 0;
    for (uint32_t i = 0; i < 32; ++i)
      if ((mask >> i & 1) && !memcmp(warp[i].collective.in, warp[l].collective.in, 8)) same |= 1u << i;
    warp[l].collective.out[0] = all ? (same == mask ? mask : 0) : same;
    warp[l].collective.out[1] = same == mask;
  }
}

inline void reduce(Lane* warp, uint32_t mask, uint32_t kind) {
  bool first = true;
  uint32_t r = 0;
  for (uint32_t l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    const uint32_t v = warp[l].collective.in[0];
    const int32_t sr = static_cast<int32_t>(r), sv = static_cast<int32_t>(v);
    if (first) r = v;
    else if (kind == 0) r += v;
    else if (kind == 1) r = v < r ? v : r;
    else if (kind == 2) r = v > r ? v : r;
    else if (kind == 3) r = sv < sr ? v : r;
    else if (kind == 4) r = sv > sr ? v : r;
    else if (kind == 5) r &= v;
    else if (kind == 6) r |= v;
    else r ^= v;
    first = false;
  }
  for (uint32_t l = 0; l < 32; ++l)
    if (mask >> l & 1) warp[l].collective.out[0] = r;
}

inline void complete(uint32_t warp_idx, Op op, uint32_t mask, uint32_t mode, uint32_t width) {
  Lane* warp = lanes + warp_idx * kWarp;
  switch (op) {
    case Op::kSync: {
      bool waited = false;
      for (uint32_t l = 0; l < 32; ++l) waited |= (mask >> l & 1) && warp[l].waited;
      for (uint32_t l = 0; l < 32; ++l)
        if (mask >> l & 1) warp[l].waited = waited;
      shadow_warp_barrier(warp_idx, mask);
      break;
    }
    case Op::kShuffle: shuffle(warp, mask, mode, width); break;
    case Op::kVote: vote(warp, mask, mode); break;
    case Op::kMatch: match(warp, mask, mode != 0); break;
    case Op::kReduce: reduce(warp, mask, mode); break;
    case Op::kMma: mma(warp, mode); break;
    case Op::kLdmatrix: ldmatrix(warp, warp_idx * kWarp, width, mode != 0); break;
    case Op::kMovmatrix: movmatrix(warp); break;
  }
}

// The lanes of one warp that wait at the same instruction with the same mask.
struct Group {
  Op op;
  uint32_t mode, width, mask, arrived;
  void* site;
};
inline Group groups[kMaxWarps][kWarp];
inline uint32_t num_groups[kMaxWarps];

inline void clear_groups() { memset(num_groups, 0, sizeof num_groups); }

// The group that waits for this lane. Fails if the lane waits elsewhere for a lane of that group.
inline Group* find_group(uint32_t warp_idx, uint32_t self, const Group& mine) {
  for (uint32_t i = 0; i < num_groups[warp_idx]; ++i) {
    Group& group = groups[warp_idx][i];
    if (!(group.mask >> self & 1) || !(mine.mask & group.arrived)) continue;  // it may still get there
    const uint32_t other = static_cast<uint32_t>(__builtin_ctz(group.arrived));
    if (group.op != mine.op || group.site != mine.site)
      fail(mine.site, group.site,
           "warp collective: lane %u is in %s at {0}, lane %u in %s at {1}: all lanes of the mask must come from the "
           "same call",
           self, op_name(mine.op), other, op_name(group.op));
    if (group.mask != mine.mask || group.mode != mine.mode || group.width != mine.width)
      fail(mine.site, nullptr,
           "%s at {0}: lanes %u and %u disagree on the mask (0x%08x, 0x%08x), the width or the kind", op_name(mine.op),
           self, other, mine.mask, group.mask);
    return &group;
  }
  return nullptr;
}

// Brings lane `current`, whose operands are in place, to the instruction. Returns when the result is there.
inline void collective(Op op, uint32_t mask, uint32_t mode, uint32_t width, void* site) {
  const uint32_t warp_idx = current / kWarp, self = current % kWarp, bit = 1u << self;
  ++stats.collectives;
  lanes[current].site = site;
  mask &= exists[warp_idx];  // in a partial warp a full mask means all of its lanes
  if (!(mask & bit)) fail(site, nullptr, "%s at {0}: lane %u is not in its own mask 0x%08x", op_name(op), self, mask);
  if (op >= Op::kMma && mask != ~0u)
    fail(site, nullptr, "%s at {0} needs a full warp, this one has %d lanes", op_name(op), __builtin_popcount(mask));
  if (mask & done[warp_idx])
    fail(site, nullptr, "%s at {0} names lanes 0x%08x in its mask 0x%08x, which have exited", op_name(op),
         mask & done[warp_idx], mask);
  const Group mine = {op, mode, width, mask, bit, site};
  Group* group = find_group(warp_idx, self, mine);
  if (group) group->arrived |= bit;
  else groups[warp_idx][num_groups[warp_idx]++] = mine;
  if ((group ? group->arrived : bit) != mask) {
    lanes[current].state = State::kCollective;
    lanes[current].waiting_mask = mask;
    yield_lane(false);
    return;
  }
  Group& last = groups[warp_idx][--num_groups[warp_idx]];
  if (group && group != &last) *group = last;
  complete(warp_idx, op, mask, mode, width);
  for (uint32_t rest = mask & ~bit; rest; rest &= rest - 1)
    wake(warp_idx * kWarp + static_cast<uint32_t>(__builtin_ctz(rest)));
}

}  // namespace exl_host
