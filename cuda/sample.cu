// sample: rows of logits -> token ids, as exl/sampling.py draws them, in two launches.
//
//   logits       f32 [L, V], V up to 2^19
//   params       Params [R] (below; ROW of exl/layout/samples.py): what each row of a launch asks for
//   adjustments  Adjustment [S]; row r's are [adjust_start, adjust_stop), of rising ids
//   masks        u32 [..]; a mask is ceil(V / 32) words from params.mask on
//   parts        Part [R, ceil(V / 4096)]: what the first launch finds in 4096 tokens of a row
//   words        Word [R, ceil(V / 32)]: which tokens are adjusted; only of rows that have adjustments
//   values       f32 [S]: adjusted logits, at the place of their adjustment
//   bin_counts   u32 [R, kBins], bin_weights u64 [R, kBins], arrived u32 [R]: zero before the first and after every launch
//   samples      i32 [..]: at params.sample a token id, or kNan, kInfinite, kForbidden if there is no distribution
//   results      Result [R]; ranked Ranked [R, kMaxRanked]: the first tokens of rows that are measured
//
// A row of a launch is a draw from a row of logits, or it measures one: the mass of its plain distribution and its first
// tokens, for log-probabilities. Several may read one row of logits.
//
// The order of drawing is descending logits, ties by lower id. A part is 4096 tokens of a row. sample_top adjusts logits and
// finds the first token of each part. sample_draw takes the first of all; a greedy row ends there. Otherwise weights are
// relative to that token's. Each block adds its part's weights to the row's 720 bins, each a sixteenth of an octave wide, and
// the last block to arrive draws the token. It finds a token by its place in the cumulated counts or weights: first the bin,
// then the place in a sorted list of at most 512 tokens, picked out of the row. A bin with more tokens is subdivided until
// one part fits the list. All sums are of integers, so a token depends on nothing but its draw and its row of logits.
//
// Grid of both: (ceil(V / 4096), R), 512 threads. Shared bytes: kTopBytes, kDrawBytes (sample.py has the same sums).
// Macros: none. Architectures: all. Tests: tests/kernels/test_sample.py, test_sample_filters.py, test_device_sampling.py
#include <exl/logit_row.cuh>
#include <exl/ptx.cuh>

constexpr int kBinsPerOctave = 16, kBins = 45 * kBinsPerOctave;
constexpr int kList = kThreads;   // one thread per token of the list
constexpr u32 kAll = 0xffffffffu;
constexpr i32 kNan = -1, kInfinite = -2, kForbidden = -3;
constexpr u64 kUnit = 1ull << kUnitBits;   // the likeliest token's weight

// Shares of a mass are times 2^64, rounded up to at least 1; 0 turns their filter off.
struct Params {
  u64 uniform;           // times 2^64, rounded down
  u64 top_p;
  u64 mirostat;          // 2^-mu: the least share of a token that is kept
  u64 xtc;               // the threshold
  double log_min_p;      // -inf: off
  double sigmas;         // 0: off
  float temperature;     // 0: greedy
  float scale_hi, scale_lo;   // log2(e) / temperature
  i32 top_k;             // 0: off
  i32 row;               // of the logits
  i32 sample;            // where the token goes; -1: nowhere, the row of logits is measured
  i32 num_ranked;        // how many of a measured row's first tokens are wanted
  i32 adjust_start, adjust_stop;
  i32 mask;              // its first word; -1: all tokens are allowed
};

// What blocks of the first launch find in their parts.
struct Part {
  u64 first;               // ~order_of the first token in the order of drawing
  u64 count;               // allowed tokens. From here on only where top-n-sigma or a measured row wants them
  u64 sum;                 // of their logits in units of 2^-16, as two's complement
  u64 squares[2];          // the sum of those squared: the lower 32 bits of each thread's sum, and the upper ones
};

struct Result {
  u64 weight, mass;   // of the token, and of all that it was drawn from; a measured row: 0, and the mass of all
  u64 mass_before;    // before mirostat's cut
  float logit;        // the token's, as it was before any adjustment; a measured row's largest
  i32 num_ranked;     // of a measured row
};
struct Ranked {
  i32 id;
  float logit;
};
constexpr int kMaxRanked = 20;

// ---- the first launch ----------------------------------------------------------------------------------------------

constexpr float kMaxSummed = 8192.0f;   // logits are clamped to it either way before they are summed

struct TopShared {
  u64 first[kWarps], sums[4][kWarps];
  Word words[kPart / 32];
};
constexpr int kTopBytes = sizeof(TopShared);

EXL_DEVICE u64 largest_of_warp(u64 v) {
  for (int d = 16; d > 0; d /= 2) {
    const u64 other = __shfl_xor_sync(kAll, v, d);
    v = other > v ? other : v;
  }
  return v;
}
EXL_DEVICE u64 sum_of_warp(u64 v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(kAll, v, d);
  return v;
}
EXL_DEVICE bool wants_sums(const Params& p) { return p.sigmas > 0.0 || p.sample < 0; }

// Applies the adjustments of the part from token `start` on. All threads must call it.
EXL_DEVICE void adjust(Row& row, const Params& p, const Adjustment* adjustments, float* values, int start, TopShared& s) {
  const int tid = static_cast<int>(threadIdx.x);
  for (int i = tid; i < kPart / 32; i += kThreads) s.words[i] = Word{0, kAll};
  __syncthreads();
  for (int i = p.adjust_start + tid; i < p.adjust_stop; i += kThreads) {
    const Adjustment a = adjustments[i];
    const int at = a.id - start;
    if (at < 0 || at >= kPart) continue;
    values[i] = adjusted(row.logits[a.id], a);
    atomicOr(&s.words[at / 32].bits, 1u << (at % 32));
    atomicMin(&s.words[at / 32].first, static_cast<u32>(i));
  }
  __syncthreads();
  row.words = s.words;
}

EXL_KERNEL(sample_top, 512, 2)
(const float* logits, const Params* params, const Adjustment* adjustments, const u32* masks, Part* parts, Word* words,
 float* values, int V) {
  EXL_DYNAMIC_SMEM(u8, smem);
  TopShared& s = *reinterpret_cast<TopShared*>(smem);
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int tid = static_cast<int>(threadIdx.x), part = static_cast<int>(blockIdx.x), r = static_cast<int>(blockIdx.y);
  const int start = part * kPart, stop = start + kPart < V ? start + kPart : V;
  const Params& p = params[r];
  const u32* mask = p.mask >= 0 ? masks + p.mask : nullptr;
  Row row{logits + static_cast<size_t>(p.row) * V, mask, nullptr, values, start, V};
  if (p.adjust_start < p.adjust_stop) {
    adjust(row, p, adjustments, values, start, s);
    Word* out = words + static_cast<size_t>(r) * ((V + 31) / 32) + start / 32;
    for (int i = tid; i < (stop - start + 31) / 32; i += kThreads) out[i] = s.words[i];
  }
  const bool sums = wants_sums(p);
  u64 first = 0;   // largest ~order, which is the smallest order
  u64 count = 0, sum = 0, squares = 0;
  for_each<2>(row, start, stop, [&](int id, float v) {
    const u64 order = ~order_of(key_of(v), static_cast<u32>(id));
    first = order > first ? order : first;
    if (!sums || key_of(v) <= kKeyMinusInfinity) return;
    const i64 unit = __float2int_rn(fminf(fmaxf(v, -kMaxSummed), kMaxSummed) * 65536.0f);   // at most 2^29
    count += 1;
    sum += static_cast<u64>(unit);
    squares += static_cast<u64>(unit * unit);   // a thread has 8 tokens, or 12 in two partial quads: less than 2^62
  });
  first = largest_of_warp(first);
  if (tid % 32 == 0) s.first[tid / 32] = first;
  if (sums) {
    const u64 mine[4] = {count, sum, squares & kAll, squares >> 32};
    EXL_UNROLL
    for (int i = 0; i < 4; ++i) {
      const u64 total = sum_of_warp(mine[i]);
      if (tid % 32 == 0) s.sums[i][tid / 32] = total;
    }
  }
  __syncthreads();
  if (tid >= 32) return;
  Part& out = parts[static_cast<size_t>(r) * gridDim.x + static_cast<size_t>(part)];
  first = largest_of_warp(tid < kWarps ? s.first[tid] : 0);
  if (tid == 0) out.first = first;
  if (!sums) return;
  u64* const totals[4] = {&out.count, &out.sum, out.squares, out.squares + 1};
  EXL_UNROLL
  for (int i = 0; i < 4; ++i) {
    const u64 total = sum_of_warp(tid < kWarps ? s.sums[i][tid] : 0);
    if (tid == 0) *totals[i] = total;
  }
}

// ---- the second launch ---------------------------------------------------------------------------------------------

struct Sum {
  u64 weight;
  u32 count;
};
EXL_DEVICE Sum operator+(Sum a, Sum b) { return Sum{a.weight + b.weight, a.count + b.count}; }

// Weights are kept as two 32-bit words: shared memory has no 64-bit atomic addition; two of 32 bits with a carry are exact.
struct Histogram {
  u32 count[kBins], low[kBins], high[kBins];
};
EXL_DEVICE void add(Histogram& h, int bin, u64 weight) {
  const u32 low = static_cast<u32>(weight);
  const u32 carry = atomicAdd(h.low + bin, low) + low < low ? 1u : 0u;
  atomicAdd(h.high + bin, static_cast<u32>(weight >> 32) + carry);
  atomicAdd(h.count + bin, 1u);
}
EXL_DEVICE Sum bin_of(const Histogram& h, int bin) {
  return Sum{static_cast<u64>(h.high[bin]) << 32 | h.low[bin], h.count[bin]};
}
EXL_DEVICE void clear(Histogram& h) {
  for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) h.count[i] = h.low[i] = h.high[i] = 0;
}

struct Found {
  Sum before, in;
  int bin;
};
struct Place {
  u64 order;     // the token
  u64 through;   // cumulated weight of the row up to and including this token
};
struct DrawShared {
  Histogram coarse, fine;
  u64 list[kList], sorted[kList], through[kList];   // orders as found, orders ascending, cumulated weights
  Sum warp[kWarps], total;
  Found found;
  Place place;
  u64 mass_before;    // before mirostat's cut
  double sigma_cut;   // the least logit that top-n-sigma keeps
  u32 key, num_listed, arrived, num_allowed;
};
constexpr int kDrawBytes = sizeof(DrawShared);

// Exclusive prefix sum over the block's threads, and the sum of all in `total`. All threads must call it.
EXL_DEVICE Sum sum_before(Sum mine, Sum& total, DrawShared& s) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  Sum through = mine;
  for (int d = 1; d < 32; d *= 2) {
    const Sum other{__shfl_up_sync(kAll, through.weight, d), __shfl_up_sync(kAll, through.count, d)};
    if (lane >= d) through = through + other;
  }
  if (lane == 31) s.warp[warp] = through;
  __syncthreads();
  Sum before{through.weight - mine.weight, through.count - mine.count};
  total = Sum{0, 0};
  for (int w = 0; w < kWarps; ++w) {
    if (w == warp) before = before + total;
    total = total + s.warp[w];
  }
  __syncthreads();   // s.warp may be written again
  return before;
}

// The bin that contains `position` of the cumulated counts or weights. There must be one.
EXL_DEVICE Found locate(const Histogram& h, u64 position, bool by_count, DrawShared& s) {
  constexpr int kEach = (kBins + kThreads - 1) / kThreads;
  const int bin0 = static_cast<int>(threadIdx.x) * kEach;
  Sum in[kEach], mine{0, 0}, total;
  EXL_UNROLL
  for (int i = 0; i < kEach; ++i) {
    in[i] = bin0 + i < kBins ? bin_of(h, bin0 + i) : Sum{0, 0};
    mine = mine + in[i];
  }
  Sum before = sum_before(mine, total, s);
  EXL_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const u64 start = by_count ? before.count : before.weight, size = by_count ? in[i].count : in[i].weight;
    if (position >= start && position - start < size) s.found = Found{before, in[i], bin0 + i};
    before = before + in[i];
  }
  __syncthreads();
  return s.found;
}

// The lowest key whose value satisfies `holds`, by a 32-way search. `holds` must be monotone: false below some key, true
// from there on up to top_key.
template <class Holds> EXL_DEVICE u32 lowest_key(u32 top_key, DrawShared& s, Holds holds) {
  if (threadIdx.x < 32) {
    u64 key = 0;   // `holds` is false for every lower key
    for (int bits = 30; bits >= 0; bits -= 5) {
      const u64 last = key + (static_cast<u64>(threadIdx.x + 1) << bits) - 1;   // the last key of this lane's share
      const u32 probe = static_cast<u32>(last);
      const bool below = last < top_key && (probe < kKeyMinusInfinity || !holds(value_of(probe)));
      key += static_cast<u64>(__popc(__ballot_sync(kAll, below))) << bits;
    }
    if (threadIdx.x == 0) s.key = static_cast<u32>(key);
  }
  __syncthreads();
  const u32 key = s.key;
  __syncthreads();
  return key;
}

// A contiguous run of the row in the order of drawing, sorted in shared memory.
struct List {
  Sum before;        // weight and count of the tokens before the run
  u64 first, last;   // its orders, both included
  int num;           // tokens; 0: nothing listed yet
};

EXL_DEVICE bool has(const List& list, u64 position, bool by_count, const DrawShared& s) {
  const u64 before = by_count ? list.before.count : list.before.weight;
  if (list.num == 0 || position < before) return false;
  return position - before < (by_count ? static_cast<u64>(list.num) : s.through[list.num - 1]);
}

EXL_DEVICE void fill(List& list, const Row& row, const Scale& scale, DrawShared& s) {
  const int tid = static_cast<int>(threadIdx.x);
  if (tid == 0) s.num_listed = 0;
  __syncthreads();
  for_each<4>(row, 0, row.V, [&](int id, float v) {
    const u64 order = order_of(key_of(v), static_cast<u32>(id));
    if (order < list.first || order > list.last) return;
    const u32 at = atomicAdd(&s.num_listed, 1u);
    if (at < kList) s.list[at] = order;
  });
  __syncthreads();
  list.num = static_cast<int>(s.num_listed < kList ? s.num_listed : kList);
  if (tid < list.num) {
    int rank = 0;
    for (int i = 0; i < list.num; ++i) rank += s.list[i] < s.list[tid];
    s.sorted[rank] = s.list[tid];
  }
  __syncthreads();
  Sum total;
  const u64 weight = tid < list.num ? weight_of(scale, value_of(key_in(s.sorted[tid]))) : 0;
  const Sum before = sum_before(Sum{weight, 0}, total, s);
  s.through[tid] = before.weight + weight;
  __syncthreads();
}

// The token at `position` of the row's cumulated counts or weights. Refills the list from the row if it is not listed.
EXL_DEVICE Place find(List& list, u64 position, bool by_count, const Row& row, const Scale& scale, DrawShared& s) {
  const int tid = static_cast<int>(threadIdx.x);
  if (!has(list, position, by_count, s)) {
    const u32 top_key = key_of(scale.top);
    const auto order_after = [&](int bin) {   // the bin's last possible order, plus 1
      const u32 key = lowest_key(top_key, s, [&](float v) {
        const float octaves = octaves_of(scale, v);
        return octaves < kOctaves && static_cast<int>(octaves * kBinsPerOctave) <= bin;
      });
      return order_of(key, kMaxId) + 1;
    };
    // Tokens without weight are in no bin, but may be wanted by count: they are one crowd behind all bins.
    const bool weightless = by_count && position >= s.total.count;
    Found found{s.total, Sum{0, kList + 1}, kBins};
    if (!weightless) found = locate(s.coarse, position, by_count, s);
    const u64 last = weightless ? order_of(kKeyMinusInfinity + 1, kMaxId) : order_after(found.bin) - 1;
    list = List{found.before, 0, last, 0};
    u32 count = found.in.count;
    if (found.before.count + count <= kList) {   // list from the row's first token: later searches hit it too
      list.before = Sum{0, 0};
    } else if (found.bin > 0) {
      list.first = order_after(found.bin - 1);
    }
    while (count > kList && list.first < list.last) {
      int shift = 0;
      while ((list.last - list.first) >> shift >= kBins) ++shift;
      clear(s.fine);
      __syncthreads();
      for_each<2>(row, 0, row.V, [&](int id, float v) {
        const u64 order = order_of(key_of(v), static_cast<u32>(id));
        if (order >= list.first && order <= list.last)
          add(s.fine, static_cast<int>((order - list.first) >> shift), weight_of(scale, v));
      });
      __syncthreads();
      found = locate(s.fine, position - (by_count ? list.before.count : list.before.weight), by_count, s);
      list.first += static_cast<u64>(found.bin) << shift;
      const u64 end = list.first + ((1ull << shift) - 1);
      list.last = end < list.last ? end : list.last;
      list.before = list.before + found.before;
      count = found.in.count;
    }
    fill(list, row, scale, s);
  }
  if (tid < list.num) {
    const u64 start = by_count ? list.before.count + static_cast<u32>(tid)
                               : list.before.weight + (tid > 0 ? s.through[tid - 1] : 0);
    const u64 through = list.before.weight + s.through[tid];
    if (by_count ? position == start : position >= start && position < through) s.place = Place{s.sorted[tid], through};
  }
  __syncthreads();
  const Place place = s.place;
  __syncthreads();
  return place;
}

// Total weight of the tokens whose key is `cut` or higher.
EXL_DEVICE u64 mass_from(u32 cut, const List& list, const Row& row, const Scale& scale, DrawShared& s) {
  const int tid = static_cast<int>(threadIdx.x);
  const u64 last = order_of(cut, kMaxId);
  const float octaves = octaves_of(scale, value_of(cut));
  Sum mine{0, 0}, total;
  if (list.num > 0 && last >= list.first && last <= list.last) {
    if (tid < list.num && s.sorted[tid] <= last) mine.weight = s.through[tid] - (tid > 0 ? s.through[tid - 1] : 0);
    if (tid == 0) mine.weight += list.before.weight;
  } else {
    const int bin = octaves < kOctaves ? static_cast<int>(octaves * kBinsPerOctave) : kBins;
    for (int i = tid; i < bin; i += kThreads) mine = mine + bin_of(s.coarse, i);
    if (bin < kBins)   // of the bin of `cut` itself only a part counts
      for_each<2>(row, 0, row.V, [&](int, float v) {
        if (key_of(v) >= cut && static_cast<int>(octaves_of(scale, v) * kBinsPerOctave) == bin) mine.weight += weight_of(scale, v);
      });
  }
  sum_before(mine, total, s);
  return total.weight;
}

// What the first launch has summed: s.num_allowed, and s.sigma_cut = top - n * the standard deviation of the allowed logits
// (top-n-sigma: Tang et al., "Top-nsigma: Not All Logits Are You Need", arXiv 2411.07641; the population's, as llama.cpp's).
// The sums are exact, of logits rounded to 2^-16 and clamped to +-2^13; then f64. Within +-256 the deviation is less than
// 2^-16 off.
EXL_DEVICE void take_sums(const Params& p, const Part* parts, int num_parts, float top, DrawShared& s) {
  if (threadIdx.x < 32) {
    u64 totals[4] = {0, 0, 0, 0};
    for (int i = static_cast<int>(threadIdx.x); i < num_parts; i += 32) {
      totals[0] += parts[i].count;
      totals[1] += parts[i].sum;
      totals[2] += parts[i].squares[0];
      totals[3] += parts[i].squares[1];
    }
    EXL_UNROLL
    for (int i = 0; i < 4; ++i) totals[i] = sum_of_warp(totals[i]);
    if (threadIdx.x == 0) {
      const double n = static_cast<double>(totals[0]), mean = static_cast<double>(static_cast<i64>(totals[1])) / n;
      const double squares = static_cast<double>(totals[3]) * 0x1p32 + static_cast<double>(totals[2]);
      const double variance = squares / n - mean * mean;
      s.sigma_cut = static_cast<double>(top) - p.sigmas * (sqrt(variance > 0.0 ? variance : 0.0) * 0x1p-16);
      s.num_allowed = static_cast<u32>(totals[0]);
    }
  }
  __syncthreads();
}

EXL_DEVICE u64 share_of(u64 share, u64 mass) {   // rounded up to whole units
  return mul_high(share, mass) + (share * mass != 0 ? 1 : 0);
}

struct Drawn {
  u64 order;   // of the token; 0: none, the row is measured
  u64 mass;    // of all that it was drawn from
};

// Draws a row's token from the complete histogram s.coarse, or finds its first tokens if it is measured. Each filter keeps a
// prefix of the order of drawing and is thus described by that prefix's weight alone; `kept` is the smallest of them. XTC
// alone takes from the front: the tokens drawn from weigh from `begin` to `kept`.
EXL_DEVICE Drawn draw(const Params& p, const Row& row, const Scale& scale, Ranked* ranked, DrawShared& s) {
  const int tid = static_cast<int>(threadIdx.x);
  Sum mine{0, 0}, total;
  for (int i = tid; i < kBins; i += kThreads) mine = mine + bin_of(s.coarse, i);
  sum_before(mine, total, s);
  if (tid == 0) s.total = total, s.mass_before = total.weight;
  __syncthreads();
  u64 kept = total.weight, begin = 0;
  u64 group = 0;                    // top-p: the mass that it takes its share of; XTC: that of the tokens above the threshold
  u32 rank = 0;
  List list{Sum{0, 0}, 0, 0, 0};
  Place place{0, 0};
  // A loop, so that each function below is compiled once. kXtcLast finds the last token of XTC's group.
  enum { kSigma, kTopK, kMinP, kTopP, kMirostat, kXtc, kXtcLast, kDraw, kRank };
  for (int stage = p.sample < 0 ? kRank : kSigma; stage <= kRank; ++stage) {
    u64 position = 0, weight_cut = 0;
    bool finds = false, cuts = false;
    if (stage == kSigma) {
      cuts = p.sigmas > 0.0;
    } else if (stage == kTopK) {
      // Tokens of weight 0 are in no bin: if k reaches them, all tokens that have weight are kept.
      finds = cuts = p.top_k > 0 && static_cast<u32>(p.top_k) < s.total.count;
      position = static_cast<u64>(p.top_k) - 1;
      group = kept;
    } else if (stage == kMinP) {
      cuts = p.log_min_p > -static_cast<double>(__uint_as_float(0x7f800000u));
    } else if (stage == kTopP) {
      // The token whose cumulated weight reaches the share is kept.
      position = share_of(p.top_p, group) - 1;
      finds = p.top_p != 0 && position < kept;
    } else if (stage == kMirostat || stage == kXtc) {
      const u64 share = stage == kXtc ? p.xtc : p.mirostat;
      group = 0;
      if (share == 0) continue;
      if (stage == kMirostat && tid == 0) s.mass_before = kept;
      weight_cut = share_of(share, kept);
      cuts = weight_cut <= kUnit;
      if (stage == kMirostat && !cuts) cuts = true, weight_cut = 0;   // nobody has the share: the likeliest are kept
    } else if (stage == kXtcLast) {
      finds = group > 0;
      position = group - 1;
    } else if (stage == kDraw) {
      finds = true;
      position = begin + mul_high(p.uniform, kept - begin);
    } else {
      const u32 wanted = static_cast<u32>(p.num_ranked);
      finds = p.sample < 0 && rank < (wanted < s.num_allowed ? wanted : s.num_allowed);
      position = rank;
    }
    if (finds) place = find(list, position, stage == kTopK || stage == kRank, row, scale, s);
    if (stage == kTopP && finds) kept = place.through;
    if (stage == kXtcLast && finds) begin = place.through - weight_of(scale, value_of(key_in(place.order)));
    if (stage == kRank && finds) {
      const u32 at = list.before.count + static_cast<u32>(tid);
      if (tid < list.num && at >= rank && at < static_cast<u32>(p.num_ranked))
        ranked[at] = Ranked{static_cast<i32>(s.sorted[tid] & kMaxId), value_of(key_in(s.sorted[tid]))};
      rank = list.before.count + static_cast<u32>(list.num);
      --stage;   // until there are enough
    }
    if (!cuts) continue;
    // Compared as on the CPU: in f64, rounded after the difference and after the quotient. Ties with the k-th are kept.
    const bool plain = stage == kSigma;   // logits themselves
    const double top = plain ? 0.0 : static_cast<double>(scale.top), divisor = plain ? 1.0 : static_cast<double>(p.temperature);
    const double cut = plain                ? s.sigma_cut
                       : stage == kTopK   ? (static_cast<double>(value_of(key_in(place.order))) - top) / divisor
                       : stage == kMinP ? p.log_min_p
                                        : 0.0;
    const u32 key = lowest_key(key_of(scale.top), s, [&](float v) {
      return weight_cut > 0 ? weight_of(scale, v) >= weight_cut : (static_cast<double>(v) - top) / divisor >= cut;
    });
    u64 mass = mass_from(key, list, row, scale, s);
    mass = mass < kept ? mass : kept;
    if (stage == kTopK) group = mass;
    if (stage == kXtc) group = mass;
    else kept = mass;
  }
  return Drawn{place.order, kept - begin};
}

EXL_KERNEL(sample_draw, 512, 1)
(const float* logits, const Params* params, const u32* masks, const Part* parts, const Word* words, const float* values,
 u32* bin_counts, u64* bin_weights, u32* arrived, i32* samples, Result* results, Ranked* ranked, int V) {
  EXL_DYNAMIC_SMEM(u8, smem);
  DrawShared& s = *reinterpret_cast<DrawShared*>(smem);
  griddepcontrol_launch_dependents();
  griddepcontrol_wait();
  const int tid = static_cast<int>(threadIdx.x), part = static_cast<int>(blockIdx.x), num_parts = static_cast<int>(gridDim.x);
  const int r = static_cast<int>(blockIdx.y);
  const Params& p = params[r];
  const Part* mine = parts + static_cast<size_t>(r) * num_parts;
  u64 first = 0;
  for (int i = tid % 32; i < num_parts; i += 32) {
    const u64 other = mine[i].first;
    first = other > first ? other : first;
  }
  first = ~largest_of_warp(first);   // computed by every warp, so no barrier is needed
  const u32 top_key = key_in(first);
  const float* own = logits + static_cast<size_t>(p.row) * V;
  const bool finite = top_key > kKeyMinusInfinity && top_key < kKeyInfinity;
  if (!finite || p.temperature == 0.0f) {   // the whole block
    const i32 code = top_key == kKeyNan ? kNan : top_key == kKeyInfinity ? kInfinite : kForbidden;
    const i32 id = finite ? static_cast<i32>(first & kMaxId) : code;
    if (part == 0 && tid == 0) {
      if (p.sample >= 0) samples[p.sample] = id;
      results[r] = Result{0, 0, 0, id >= 0 ? own[id] : 0.0f, 0};
    }
    return;
  }
  const u32* mask = p.mask >= 0 ? masks + p.mask : nullptr;
  const Word* adjusted = p.adjust_start < p.adjust_stop ? words + static_cast<size_t>(r) * ((V + 31) / 32) : nullptr;
  const Row row{own, mask, adjusted, values, 0, V};
  const Scale scale{value_of(top_key), p.scale_hi, p.scale_lo};
  clear(s.coarse);
  __syncthreads();
  for_each<2>(row, part * kPart, (part + 1) * kPart < V ? (part + 1) * kPart : V, [&](int, float v) {
    const float octaves = octaves_of(scale, v);
    if (octaves < kOctaves) add(s.coarse, static_cast<int>(octaves * kBinsPerOctave), weight_of(scale, v));
  });
  __syncthreads();
  if (num_parts > 1) {
    u32* counts = bin_counts + static_cast<size_t>(r) * kBins;
    u64* weights = bin_weights + static_cast<size_t>(r) * kBins;
    for (int i = tid; i < kBins; i += kThreads) {
      const Sum in = bin_of(s.coarse, i);
      if (in.count == 0) continue;
      atomicAdd(counts + i, in.count);
      atomicAdd(weights + i, in.weight);
    }
    __threadfence();
    __syncthreads();
    if (tid == 0) s.arrived = atomicInc(arrived + r, static_cast<u32>(num_parts - 1));   // the last block resets it to 0
    __syncthreads();
    if (s.arrived != static_cast<u32>(num_parts - 1)) return;
    __threadfence();
    for (int i = tid; i < kBins; i += kThreads) {
      const u64 weight = __ldcg(weights + i);
      s.coarse.count[i] = __ldcg(counts + i);
      s.coarse.low[i] = static_cast<u32>(weight);
      s.coarse.high[i] = static_cast<u32>(weight >> 32);
      counts[i] = 0;
      weights[i] = 0;
    }
    __syncthreads();
  }
  if (wants_sums(p)) take_sums(p, mine, num_parts, scale.top, s);
  const Drawn drawn = draw(p, row, scale, ranked + static_cast<size_t>(r) * kMaxRanked, s);
  if (tid != 0) return;
  if (p.sample < 0) {
    const i32 allowed = static_cast<i32>(s.num_allowed);
    results[r] = Result{0, drawn.mass, s.mass_before, scale.top, p.num_ranked < allowed ? p.num_ranked : allowed};
    return;
  }
  const i32 id = static_cast<i32>(drawn.order & kMaxId);
  samples[p.sample] = id;
  results[r] = Result{weight_of(scale, value_of(key_in(drawn.order))), drawn.mass, s.mass_before, own[id], 0};
}
