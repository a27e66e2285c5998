#pragma once
// Layout of one page of one kv head: [K codes | K scales | V codes | V scales] of 64 tokens. The same arithmetic as
// exl/layout/pages.py.
//
// Macros: EXL_D head size, a multiple of 8 up to 256; EXL_K_BITS, EXL_V_BITS: 16, 8 or 4.
#include <exl/platform.cuh>

constexpr int kPageTokens = 64, kD = EXL_D, kKBits = EXL_K_BITS, kVBits = EXL_V_BITS;
constexpr bool kQuantized = kKBits < 16;
constexpr int kGroupChannels = 32;                                                     // channels that share a scale
constexpr int kGroups = kQuantized ? (kD + kGroupChannels - 1) / kGroupChannels : 0;   // scales per token
constexpr int kScaleBytes = kPageTokens * kGroups * 2;
constexpr int kKScalesAt = kPageTokens * kD * kKBits / 8, kVCodesAt = kKScalesAt + kScaleBytes;
constexpr int kVScalesAt = kVCodesAt + kPageTokens * kD * kVBits / 8, kPageBytes = kVScalesAt + kScaleBytes;
constexpr int kRotation = kQuantized ? kD & -kD : 1;                                   // channels of a Hadamard block

// Byte of K's code of a token and channel. At 4 bits, channels i and i + 2 of each four share a byte, i in its low nibble.
EXL_DEVICE constexpr int k_code_at(int token, int channel) {
  const int g = token % 8, r = token / 8 % 2, tile = channel / 64, h = channel / 32 % 2, t = channel / 8 % 4, i = channel % 8;
  const int in_lane = (2 * h + r) * kKBits, bit = kKBits == 4 ? 4 * (i / 2) + 16 * (i % 2) : i * kKBits;
  const int whole = in_lane / 16 * 512 + (4 * g + t) * 16 + in_lane % 16, part = ((channel % 64 / 8 * 8 + g) * 2 + r) * kKBits;
  return token / 16 * (2 * kD * kKBits) + tile * (128 * kKBits) + (tile < kD / 64 ? whole : part) + bit / 8;
}
// Byte of V's code. At 4 bits, channels c and c + 8 of each 16 share a byte; in a last tile of 8 channels, c and c + 4.
EXL_DEVICE constexpr int v_code_at(int token, int channel) {
  const int t = token / 2 % 4, j = token / 16, place = token % 2 + 2 * (token / 8 % 2), byte4 = place == 1 || place == 2 ? 3 - place : place;
  const int at = kVCodesAt + channel / 16 * (128 * kVBits), r = channel / 8 % 2;
  if (channel / 16 == kD / 16) {   // the last tile, of 8 channels
    const int lane = 4 * (channel % (kVBits == 4 ? 4 : 8)) + t, word = kVBits == 16 ? 2 * j + place / 2 : j;
    return at + word / 4 * 512 + lane * 16 + word % 4 * 4 + (kVBits == 16 ? place % 2 * 2 : kVBits == 8 ? place : byte4);
  }
  const int lane = 4 * (channel % 8) + t, word = kVBits == 16 ? 4 * j + r + 2 * (place / 2) : kVBits == 8 ? 2 * j + r : j;
  return at + word / 4 * 512 + lane * 16 + word % 4 * 4 + (kVBits == 16 ? place % 2 * 2 : kVBits == 8 ? place : byte4);
}
EXL_DEVICE constexpr int k_scale_at(int token, int group) {
  return kKScalesAt + 2 * (((token / 16 * 8 + token % 8) * kGroups + group) * 2 + token / 8 % 2);
}
EXL_DEVICE constexpr int v_scale_at(int token, int group) {
  return kVScalesAt + 2 * (((group * 4 + token / 2 % 4) * 4 + token / 16) * 4 + token % 2 + 2 * (token / 8 % 2));
}
