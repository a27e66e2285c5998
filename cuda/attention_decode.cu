// attention_decode: everything between qkv and o_proj for up to 8 new tokens per sequence, in one launch: norm, RoPE,
// Hadamard rotation, append to the pages, attention over the pages.
//
//   qkv, q_norm, k_norm, cosine, sine, slots, pages   as in append_kv.cu
//   query_start  i32 [B + 1]: sequence b owns rows query_start[b] .. query_start[b + 1] - 1
//   context_len  i32 [B]: tokens of the sequence, the new ones included; 0: the sequence is empty
//   page_table   i32 [B, max_pages]
//   out          f16 [num_tokens, H * kD], saturated; channel n is stored at channel_map[n] (i32 [H * kD]) if not null
//   first_part   i32 [B]: items of the sequences before b, whose parts lie before those of b
//   partial      f32 [items of all sequences, times Hkv * column tiles][8][kD + 2]: O, then m and l, of each item's
//                columns; sequence by sequence, then by pair of kv head and column tile, then by item
//   sinks        f32 [H]: scores of the heads' sinks; read if EXL_SINKS is defined
//   arrived      u32 [B][Hkv * column tiles], zero before the first launch and after every launch
//
// The context is cut into items: of 256 tokens up to token 4096, of 1024 after it. A column is one query head of the kv
// head's group and one new token. A block takes one item, one kv head and 8 columns. Item borders do not depend on the
// length, a page goes to the warp (of 4) of its number, and warps and items are added in the order of their numbers: a
// row's bits depend neither on the batch nor on the other new tokens, which are exact zeros for columns that do not see
// them. A block appends the new tokens of its item before it reads them; blocks of other columns write the same bytes.
// The last block to arrive combines the items; the counter is the only atomic.
//
// Block: 4 warps; grid: (max_items, Hkv * column tiles, B). Shared bytes: kSharedBytes (attention_decode.py has the same sum).
// Macros: attend.cuh. Architectures: all; below sm_75 in f32 arithmetic. Tests: tests/kernels/test_attention_decode.py
#include <exl/attend.cuh>
#include <exl/attend_simt.cuh>
#include <exl/head_row.cuh>

constexpr int kWarps = 4, kThreads = 128, kColumns = 8;
constexpr int kShort = 256, kShortEnd = 4096, kLong = 1024;

EXL_DEVICE int item_start(int item) {
  return item <= kShortEnd / kShort ? item * kShort : kShortEnd + (item - kShortEnd / kShort) * kLong;
}
EXL_DEVICE int items_of(int length) {
  return length <= kShortEnd ? (length + kShort - 1) / kShort : kShortEnd / kShort + (length - kShortEnd + kLong - 1) / kLong;
}

// row[warp]: one head's channels [kD], then m and l of the warp's columns, then, for warp 0, the count of arrived blocks.
// Below sm_75 the probabilities use the same bytes, after the rows are done and before the sums: sm_61 has only 48 KB.
constexpr int kRowFloats = kHasMma || kD + 20 > kSimtProbabilities ? kD + 20 : kSimtProbabilities;
struct Shared {
  float row[kWarps][kRowFloats];
  float o[kWarps][kColumns][kD];
  float q[kHasMma ? kColumns * kQPitch / 2 : kColumns * kSimtPitch];   // halves, or below sm_75 floats
  EXL_DEVICE float& m(int warp, int column) { return row[warp][kD + column]; }
  EXL_DEVICE float& l(int warp, int column) { return row[warp][kD + kColumns + column]; }
  EXL_DEVICE u32& arrived() { return *reinterpret_cast<u32*>(&row[0][kD + 2 * kColumns]); }
};
constexpr int kSharedBytes = sizeof(Shared);

// Combines `parts` partial results of one channel, in the order of their numbers. Entries of m, l and o are `pitch` floats
// apart. Returns the unnormalised O, with its maximum in `top` and its sum in `sum`.
EXL_DEVICE float combined(const float* o, const float* m, const float* l, int parts, size_t pitch, float& top, float& sum) {
  top = kNone;
  for (int i = 0; i < parts; ++i) top = fmaxf(top, __ldcg(m + i * pitch));
  float value = 0.0f;
  sum = 0.0f;
  for (int i = 0; i < parts; ++i) {
    const float factor = ex2_approx(__ldcg(m + i * pitch) - top);
    sum = fmaf(factor, __ldcg(l + i * pitch), sum);
    value = fmaf(factor, __ldcg(o + i * pitch), value);
  }
  return value;
}

EXL_KERNEL(attention_decode, 128, 2)
(const void* qkv, const float* __restrict__ q_norm, const float* __restrict__ k_norm, const float* cosine, const float* sine,
 const i32* slots, const i32* query_start, const i32* context_len, const i32* page_table, const i32* first_part,
 u8* pages, half* out, const i32* __restrict__ channel_map, float* partial, u32* arrived, const float* __restrict__ sinks, int num_heads, int num_kv_heads, int column_tiles,
 int max_pages, int half_dim, int in_type, int qkv_stride, int window, float scale, float softcap, float eps) {
  EXL_DYNAMIC_SMEM(u8, smem);
  Shared& s = *reinterpret_cast<Shared*>(smem);
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, tid = static_cast<int>(threadIdx.x);
  const int item = static_cast<int>(blockIdx.x), sequence = static_cast<int>(blockIdx.z);
  const int kv_head = static_cast<int>(blockIdx.y) / column_tiles, column0 = static_cast<int>(blockIdx.y) % column_tiles * kColumns;
  const int row0 = query_start[sequence], num_new = query_start[sequence + 1] - row0, length = context_len[sequence];
  const int group = num_heads / num_kv_heads, before = length - num_new;   // before: tokens ahead of the new ones
  const int num_columns = group * num_new - column0 < kColumns ? group * num_new - column0 : kColumns;
  const int oldest = window > 0 && before - window + 1 > 0 ? before - window + 1 : 0;   // first token that any new token sees
  int first_item = 0;
  while (item_start(first_item + 1) <= oldest) ++first_item;
  const int last_item = items_of(length) - 1;
  if (num_columns <= 0 || item < first_item || item > last_item) return;   // the whole block

  const Columns columns{column0, num_columns, group, before, window};
  float* row = s.row[warp];
  half* s_q = reinterpret_cast<half*>(s.q);
  for (int c = warp; c < kColumns; c += kWarps) {
    const bool there = c < num_columns;
    const int token = row0 + (column0 + c) / group, head = kv_head * group + (column0 + c) % group;
    if (there) {
      const size_t at = static_cast<size_t>(token) * qkv_stride + head * kD, angle = static_cast<size_t>(token) * half_dim;
      for (int i = lane; i < kD; i += 32) row[i] = load_value(qkv, at + i, in_type);
      __syncwarp();
      if (q_norm != nullptr) normalise(row, q_norm, eps, lane);
      rotate_by_position(row, cosine + angle, sine + angle, half_dim, lane);
      rotate_by_hadamard(row, lane);
    }
    for (int i = lane; i < kRuns * 32; i += 32) {
      const half value = saturated_half(there && i < kD ? row[i] : 0.0f);
      if constexpr (kHasMma) s_q[c * kQPitch + i] = value;
      else s.q[c * kSimtPitch + i] = __half2float(value);
    }
    __syncwarp();
  }
  // Append the new tokens of this item to their pages: even i is K, odd i is V.
  const int start = item_start(item), end = item_start(item + 1) < length ? item_start(item + 1) : length;
  for (int i = warp; i < 2 * num_new; i += kWarps) {
    const int token = row0 + i / 2, place = before + i / 2, slot = slots[token];
    if (place < start || place >= end || slot < 0) continue;
    const int head = num_heads + i % 2 * num_kv_heads + kv_head;
    const size_t at = static_cast<size_t>(token) * qkv_stride + head * kD, angle = static_cast<size_t>(token) * half_dim;
    for (int c = lane; c < kD; c += 32) row[c] = load_value(qkv, at + c, in_type);
    __syncwarp();
    if (i % 2 == 0) {
      if (k_norm != nullptr) normalise(row, k_norm, eps, lane);
      rotate_by_position(row, cosine + angle, sine + angle, half_dim, lane);
    }
    rotate_by_hadamard(row, lane);
    u8* page = pages + (static_cast<size_t>(slot / kPageTokens) * num_kv_heads + kv_head) * kPageBytes;
    if (i % 2 == 0) store_row<false>(page, slot % kPageTokens, row, lane);
    else store_row<true>(page, slot % kPageTokens, row, lane);
    __syncwarp();
  }
  __syncthreads();   // q and the appended bytes are visible to all warps

  const auto page_of = [&](int number) {
    const size_t page = static_cast<size_t>(page_table[static_cast<size_t>(sequence) * max_pages + number]);
    return pages + (page * num_kv_heads + kv_head) * kPageBytes;
  };
  const int first_page = start / kPageTokens + warp, oldest_page = oldest / kPageTokens;
  if constexpr (kHasMma) {
    const int t = lane % 4, g = lane / 4;
    const Question question[1][2] = {{columns.question(2 * t), columns.question(2 * t + 1)}};
    Attended<1> a = {};
    a.m[0][0] = a.m[0][1] = kNone;
    for (int number = first_page; number * kPageTokens < end; number += kWarps)
      if (number >= oldest_page) attend_page(a, page_of(number), number * kPageTokens, s_q, question, length, lane, scale, softcap);
    EXL_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float l = sum_over_rows(a.l[0][e]);
      if (g == 0) { s.m(warp, 2 * t + e) = a.m[0][e]; s.l(warp, 2 * t + e) = l; }
    }
    EXL_UNROLL
    for (int c = 0; c < kTiles; ++c)
      EXL_UNROLL
      for (int e = 0; e < 4; ++e)
        if (c * 16 + 8 * (e / 2) < kD) s.o[warp][2 * t + e % 2][c * 16 + g + 8 * (e / 2)] = a.o[0][c].r[e];
  } else {
    const SimtWarp mine{s.q, s.o[warp][0], row};
    SimtSums sums{kNone, 0.0f};
    for (int i = lane; i < kColumns * kD; i += 32) mine.o[i] = 0.0f;
    __syncwarp();
    for (int number = first_page; number * kPageTokens < end; number += kWarps)
      if (number >= oldest_page) attend_page_simt(sums, mine, page_of(number), number * kPageTokens, columns, length, lane, scale, softcap);
    if (lane < kColumns) { s.m(warp, lane) = sums.m; s.l(warp, lane) = sums.l; }
  }
  __syncthreads();

  // Combine the warps' results of this item's columns; the last block to arrive then combines all items.
  const size_t pair = static_cast<size_t>(sequence) * gridDim.y + blockIdx.y;
  const size_t first = static_cast<size_t>(first_part[sequence]) * gridDim.y + blockIdx.y * static_cast<u32>(last_item + 1);
  float* parts = partial + first * (kColumns * (kD + 2));
  float* mine = parts + static_cast<size_t>(item) * (kColumns * (kD + 2));
  for (int i = tid; i < num_columns * kD; i += kThreads) {
    const int column = i / kD, channel = i % kD;
    float top = kNone;
    EXL_UNROLL
    for (int w = 0; w < kWarps; ++w) top = fmaxf(top, s.m(w, column));
    float o = 0.0f, l = 0.0f;
    EXL_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      const float factor = ex2_approx(s.m(w, column) - top);
      o = fmaf(factor, s.o[w][column][channel], o);
      l = fmaf(factor, s.l(w, column), l);
    }
    float* to = mine + column * (kD + 2);
    to[channel] = o;
    if (channel == 0) { to[kD] = top; to[kD + 1] = l; }
  }
  const int num_items = last_item - first_item + 1;
  __threadfence();
  __syncthreads();
  if (tid == 0) s.arrived() = atomicInc(arrived + pair, static_cast<u32>(num_items - 1));   // the last block resets it to 0
  __syncthreads();
  if (s.arrived() != static_cast<u32>(num_items - 1)) return;
  __threadfence();
  for (int c = warp; c < num_columns; c += kWarps) {
    const int token = row0 + (column0 + c) / group, head = kv_head * group + (column0 + c) % group;
    const float* from = parts + static_cast<size_t>(first_item) * (kColumns * (kD + 2)) + c * (kD + 2);
    for (int channel = lane; channel < kD; channel += 32) {
      float top, sum;
      const float value = combined(from + channel, from + kD, from + kD + 1, num_items, kColumns * (kD + 2), top, sum);
      if constexpr (kSinks) sum += sink_weight(sinks[head], top);
      row[channel] = sum == 0.0f ? 0.0f : value / sum;   // 0: the column sees no token; NaN stays NaN
    }
    __syncwarp();
    rotate_by_hadamard(row, lane);
    for (int channel = lane; channel < kD; channel += 32) {
      const int n = head * kD + channel;
      out[static_cast<size_t>(token) * num_heads * kD + (channel_map == nullptr ? n : channel_map[n])] = saturated_half(row[channel]);
    }
    __syncwarp();
  }
}
