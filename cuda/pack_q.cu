// pack_q: a checkpoint's tensors -> 16-row tiles (exl/kernels/tile_layout.py), on the device: loading waits for the bus
// alone. Two entries: pack_codes and pack_meta.
//
// Up to three matrices side by side along N (q, k, v; gate, up): rows[i] is the output, counted over all of them, that row
// i of the tiles is, or -1 for padding, which becomes zeros.
//
//   GPTQ (EXL_AWQ 0; AutoGPTQ's qlinear): qweight i32 [K * bits / 32, N], codes of one column packed along K as one
//   stream of bits, lowest first; qzeros i32 [G, N * bits / 32] the same along N, zero point = (stored + zero_offset)
//   mod 2^bits, zero_offset 1 in version 1 of the format and 0 in version 2; scales f16 [G, N]; order i32 [K] or null:
//   row i in the order of groups is the file's row order[i].
//   AWQ (EXL_AWQ 1, 4 bits; AutoAWQ's GEMM): qweight i32 [K, N / 8], qzeros i32 [G, N / 8], in each word the columns
//   0 2 4 6 1 3 5 7, lowest first; zero_offset 0; no order.
//
// pack_codes: a thread makes the words of one lane for 64 inputs; block 256, grid (ceil(stages * blocks * 32 / 256), tiles).
// pack_meta: a thread makes one pair of scales and of zeros; block 256, grid (ceil(groups * 8 / 256), tiles).
// Macros: EXL_BITS 2|3|4|8, EXL_AWQ. Architectures: all. Tests: tests/kernels/test_pack.py
#include <exl/half.cuh>

constexpr int kBits = EXL_BITS;
constexpr bool kAwq = EXL_AWQ;
constexpr int kStageK = kBits == 4 || kBits == 8 ? 128 : 256;
constexpr int kBlocks = kStageK / 64, kPlanes = kStageK * kBits * 16 / 8 / 512;
constexpr u32 kMask = (1u << kBits) - 1u;

// Value i of a stream of kBits-bit values, lowest bits first; word w of it is words[w * stride].
EXL_DEVICE u32 stream_value(const u32* words, size_t stride, int i) {
  const u32 bit = static_cast<u32>(i) * kBits, shift = bit % 32;
  const size_t word = bit / 32;
  u32 v = words[word * stride] >> shift;
  if (32 % kBits != 0 && shift + kBits > 32) v |= words[(word + 1) * stride] << (32 - shift);
  return v & kMask;
}
// Place of column n among the eight of its AWQ word.
EXL_DEVICE u32 awq_shift(int n) { return 4u * (static_cast<u32>(n) % 8 / 2 + static_cast<u32>(n) % 2 * 4); }

// The matrix that output `row` of all belongs to, and its column there; -1 for padding.
EXL_DEVICE int find_part(int& column, int row, int n0, int n1) {
  column = row < n0 ? row : row < n0 + n1 ? row - n0 : row - n0 - n1;
  return row < 0 ? -1 : row < n0 ? 0 : row < n0 + n1 ? 1 : 2;
}

EXL_KERNEL(pack_codes, 256, 2)
(const u32* __restrict__ qweight0, const u32* __restrict__ qweight1, const u32* __restrict__ qweight2,
 const i32* __restrict__ order, const i32* __restrict__ rows, u32* codes, int K, int n0, int n1, int n2) {
  const int num_stages = (K + kStageK - 1) / kStageK;
  const int i = static_cast<int>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x), lane = i % 32, block = i / 32;
  if (block >= num_stages * kBlocks) return;
  const int tile = static_cast<int>(blockIdx.y), g = lane / 4, t = lane % 4;
  u32 words[kBits] = {};   // 16 rows * 64 inputs * kBits / 32 lanes / 32
  EXL_UNROLL
  for (int high = 0; high < 2; ++high) {
    int column;
    const int part = find_part(column, rows[tile * 16 + g + 8 * high], n0, n1);
    if (part < 0) continue;
    const u32* qweight = part == 0 ? qweight0 : part == 1 ? qweight1 : qweight2;
    const size_t N = static_cast<size_t>(part == 0 ? n0 : part == 1 ? n1 : n2);
    EXL_UNROLL
    for (int e = 0; e < 16; ++e) {   // input 32 (j / 2) + 8 t + 4 (j % 2) + 2 ph + second is in pair high + 2 ph of mma j
      const int j = e / 4, ph = e / 2 % 2, second = e % 2, pair = high + 2 * ph;
      const int k = block * 64 + 32 * (j / 2) + 8 * t + 4 * (j % 2) + 2 * ph + second;
      if (k >= K) continue;
      const int file_k = order != nullptr ? order[k] : k;
      u32 code;
      if (kAwq) code = qweight[static_cast<size_t>(file_k) * (N / 8) + static_cast<size_t>(column / 8)] >> awq_shift(column) & kMask;
      else code = stream_value(qweight + column, N, file_k);
      if (kBits == 4) words[j % kBits] |= code << (4 * pair + 16 * second);
      if (kBits == 8) words[(2 * j + pair / 2) % kBits] |= code << (16 * (pair % 2) + 8 * second);
      if (kBits == 2) words[j / 2 % kBits] |= code << (8 * (j % 2) + 2 * pair + 16 * second);
      if (kBits == 3) {
        const int q = 4 * j + pair;
        if (q < 15) words[q / 5 % kBits] |= code << (3 * (q % 5) + 16 * second);
        else
          for (int b = 0; b < 3; ++b) words[b % kBits] |= (code >> b & 1u) << (15 + 16 * second);
      }
    }
  }
  const int stage = block / kBlocks, first = block % kBlocks * kBits;   // the lane's words first .. first + kBits - 1 of the stage
  u32* out = codes + (static_cast<size_t>(tile) * num_stages + stage) * kPlanes * 128 + lane * 4;
  EXL_UNROLL
  for (int w = 0; w < kBits; ++w) out[static_cast<size_t>((first + w) / 4) * 128 + (first + w) % 4] = words[w];
}

EXL_KERNEL(pack_meta, 256, 2)
(const half* __restrict__ scales0, const half* __restrict__ scales1, const half* __restrict__ scales2,
 const u32* __restrict__ qzeros0, const u32* __restrict__ qzeros1, const u32* __restrict__ qzeros2,
 const i32* __restrict__ rows, half* scales, u8* zeros, int G, int num_groups, int n0, int n1, int n2, int zero_offset) {
  const int i = static_cast<int>(blockIdx.x) * 256 + static_cast<int>(threadIdx.x), group = i / 8, g = i % 8;
  if (group >= num_groups) return;
  const int tile = static_cast<int>(blockIdx.y);
  half scale[2] = {__ushort_as_half(0), __ushort_as_half(0)};
  u32 zero[2] = {0, 0};
  EXL_UNROLL
  for (int high = 0; high < 2; ++high) {
    int column;
    const int part = find_part(column, rows[tile * 16 + g + 8 * high], n0, n1);
    if (part < 0 || group >= G) continue;   // padding of N, of K
    const size_t N = static_cast<size_t>(part == 0 ? n0 : part == 1 ? n1 : n2);
    scale[high] = (part == 0 ? scales0 : part == 1 ? scales1 : scales2)[group * N + column];
    if (zeros == nullptr) continue;
    const u32* qzeros = (part == 0 ? qzeros0 : part == 1 ? qzeros1 : qzeros2) + group * (N * kBits / 32);
    const u32 stored = kAwq ? qzeros[column / 8] >> awq_shift(column) : stream_value(qzeros, 1, column);
    zero[high] = (stored + static_cast<u32>(zero_offset)) & kMask;
  }
  const size_t at = (static_cast<size_t>(tile) * num_groups + group) * 8 + g;
  scales[at * 2] = scale[0];
  scales[at * 2 + 1] = scale[1];
  if (zeros == nullptr) return;
  if (kBits == 8) {
    zeros[at * 2] = static_cast<u8>(zero[0]);
    zeros[at * 2 + 1] = static_cast<u8>(zero[1]);
  } else {
    const u32 both = zero[0] | zero[1] << kBits;
    zeros[at] = static_cast<u8>(kBits == 2 ? both | both << 4 : both);
  }
}
