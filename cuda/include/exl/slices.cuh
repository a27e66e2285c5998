#pragma once
// K is cut into 8 slices; their sums are added in a balanced binary tree: ((0+1)+(2+3)) + ((4+5)+(6+7)). Both depend only
// on K, so the bits do not depend on which warp or block computes a slice, or when.
#include <exl/platform.cuh>

constexpr int kSlices = 8;

// First stage of slice s.
EXL_DEVICE int slice_start(int s, int num_stages) {
  return static_cast<int>(static_cast<u32>(s) * static_cast<u32>(num_stages) / static_cast<u32>(kSlices));
}

// Root of the tree over v[0 .. kCount-1]: adjacent slices, kCount a power of two. Overwrites v.
template <int kCount> EXL_DEVICE float4 tree_sum(float4 (&v)[kCount]) {
  EXL_UNROLL
  for (int d = 1; d < kCount; d *= 2) {
    EXL_UNROLL
    for (int s = 0; s < kCount; s += 2 * d) {
      v[s].x += v[s + d].x;
      v[s].y += v[s + d].y;
      v[s].z += v[s + d].z;
      v[s].w += v[s + d].w;
    }
  }
  return v[0];
}
