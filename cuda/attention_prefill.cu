// attention_prefill: causal attention of a chunk of new tokens over the pages that append_kv.cu has filled.
//
//   q            f16 [num_tokens, H, kD], as append_kv.cu leaves it
//   query_start  i32 [B + 1]: sequence b owns rows query_start[b] .. query_start[b + 1] - 1
//   context_len  i32 [B]: tokens of the sequence, the new ones included; 0: the sequence is empty
//   page_table   i32 [B, max_pages]; pages u8 [pages][Hkv][kPageBytes] (page.cuh)
//   sinks        f32 [H]: scores of the heads' sinks; read if EXL_SINKS is defined
//   out          f16 [num_tokens, H * kD], saturated; channel n is stored at channel_map[n] (i32 [H * kD]) if not null
//
// A column is one query head of the kv head's group and one new token. A warp has 8 kN columns and goes through all
// pages that they see, in order, so that a row's bits do not depend on the other rows. Codes are read straight from the
// pages: the context is never copied to another type.
//
// Block: EXL_WARPS warps; grid: (blocks of columns, Hkv, B). Shared bytes: EXL_WARPS * kWarpBytes (attention_prefill.py
// has the same sum).
// Macros: attend.cuh; EXL_N: kN, 1 or 2, below sm_75 1; EXL_WARPS 2 or 4. Architectures: all; below sm_75 in f32
// arithmetic. Tests: tests/kernels/test_attention_prefill.py
#include <exl/attend.cuh>
#include <exl/attend_simt.cuh>
#include <exl/head_row.cuh>

constexpr int kN = EXL_N, kWarps = EXL_WARPS, kColumns = 8 * kN;   // kColumns: per warp
// Shared memory per warp: q, later overwritten by eight columns of O; below sm_75 O, q and probabilities side by side.
constexpr int kQBytes = kColumns * kQPitch * 2, kOBytes = 8 * kD * 4, kMmaBytes = kQBytes > kOBytes ? kQBytes : kOBytes;
constexpr int kWarpBytes = kHasMma ? kMmaBytes : kOBytes + 8 * kSimtPitch * 4 + kSimtProbabilities * 4;

EXL_KERNEL(attention_prefill, 128, 1)
(const half* q, const i32* query_start, const i32* context_len, const i32* page_table, const u8* pages, half* out,
 const i32* __restrict__ channel_map, const float* __restrict__ sinks, int num_heads, int num_kv_heads, int max_pages, int window, float scale, float softcap) {
  EXL_DYNAMIC_SMEM(u8, smem);
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32, g = lane / 4, t = lane % 4;
  const int kv_head = static_cast<int>(blockIdx.y), sequence = static_cast<int>(blockIdx.z);
  const int row0 = query_start[sequence], num_new = query_start[sequence + 1] - row0, length = context_len[sequence];
  const int group = num_heads / num_kv_heads, before = length - num_new;
  const int column0 = (static_cast<int>(blockIdx.x) * kWarps + warp) * kColumns;
  const int left = group * num_new - column0, num_columns = left < kColumns ? left : kColumns;
  if (num_columns <= 0) return;   // whole warps; there is no block barrier

  u8* mine = smem + warp * kWarpBytes;
  half* s_q = reinterpret_cast<half*>(mine);
  float* rows = reinterpret_cast<float*>(mine);   // O [8][kD]
  float* q32 = rows + 8 * kD;
  for (int c = 0; c < kColumns; ++c) {
    const int token = row0 + (column0 + c) / group, head = kv_head * group + (column0 + c) % group;
    const half* from = q + (static_cast<size_t>(token) * num_heads + head) * kD;
    for (int i = lane; i < kRuns * 32; i += 32) {
      const half value = c < num_columns && i < kD ? from[i] : __float2half_rn(0.0f);
      if constexpr (kHasMma) s_q[c * kQPitch + i] = value;
      else q32[c * kSimtPitch + i] = __half2float(value);
    }
  }
  if constexpr (!kHasMma)
    for (int i = lane; i < 8 * kD; i += 32) rows[i] = 0.0f;
  __syncwarp();

  // Columns are in token order: the first column's window starts earliest, the last column sees the newest token.
  const Columns columns{column0, num_columns, group, before, window};
  Question question[kN][2];
  EXL_UNROLL
  for (int i = 0; i < 2 * kN; ++i) question[i / 2][i % 2] = columns.question(i / 2 * 8 + 2 * t + i % 2);
  Attended<kN> a = {};
  EXL_UNROLL
  for (int n = 0; n < kN; ++n) a.m[n][0] = a.m[n][1] = kNone;
  SimtSums sums{kNone, 0.0f};
  const int newest = before + (column0 + num_columns - 1) / group, oldest = before + column0 / group - window + 1;
  const int first_page = window > 0 && oldest > 0 ? oldest / kPageTokens : 0;
  for (int number = first_page; number * kPageTokens <= newest; ++number) {
    const size_t index = static_cast<size_t>(page_table[static_cast<size_t>(sequence) * max_pages + number]);
    const u8* page = pages + (index * num_kv_heads + kv_head) * kPageBytes;
    if constexpr (kHasMma) {
      attend_page<kN>(a, page, number * kPageTokens, s_q, question, length, lane, scale, softcap);
    } else {
      const SimtWarp shared{q32, rows, q32 + 8 * kSimtPitch};
      attend_page_simt<8>(sums, shared, page, number * kPageTokens, columns, length, lane, scale, softcap);
    }
  }

  // Store O / l through shared memory, eight columns at a time.
  EXL_UNROLL
  for (int n = 0; n < kN; ++n) {
    __syncwarp();
    if constexpr (kHasMma) {
      EXL_UNROLL
      for (int e = 0; e < 4; ++e) {
        float l = sum_over_rows(a.l[n][e % 2]);
        if constexpr (kSinks) l += sink_weight(sinks[kv_head * group + (column0 + n * 8 + 2 * t + e % 2) % group], a.m[n][e % 2]);
        const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
        EXL_UNROLL
        for (int c = 0; c < kTiles; ++c)
          if (c * 16 + 8 * (e / 2) < kD) rows[(2 * t + e % 2) * kD + c * 16 + g + 8 * (e / 2)] = a.o[n][c].r[e] * inverse;
      }
    } else {
      for (int c = 0; c < 8; ++c) {
        float l = __shfl_sync(kWarp, sums.l, c);
        if constexpr (kSinks) l += sink_weight(sinks[kv_head * group + (column0 + c) % group], __shfl_sync(kWarp, sums.m, c));
        const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
        for (int i = lane; i < kD; i += 32) rows[c * kD + i] *= inverse;
      }
    }
    __syncwarp();
    for (int c = 0; c < 8 && n * 8 + c < num_columns; ++c) {
      rotate_by_hadamard(rows + c * kD, lane);
      const int column = column0 + n * 8 + c, token = row0 + column / group, head = kv_head * group + column % group;
      for (int i = lane; i < kD; i += 32) {
        const int to = head * kD + i;
        out[static_cast<size_t>(token) * num_heads * kD + (channel_map == nullptr ? to : channel_map[to])] = saturated_half(rows[c * kD + i]);
      }
    }
  }
}
