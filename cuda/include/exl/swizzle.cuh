#pragma once
// Where a 16-byte chunk of a token's activations lies in shared memory: the lanes of a quarter warp read two rows and
// four chunks at once, and so touch all 32 banks once, without padding between the rows.
#include <exl/platform.cuh>

EXL_DEVICE int swizzled_chunk(int chunk, int row) { return chunk ^ ((row & 1) << 2); }
