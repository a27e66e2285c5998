#pragma once
// Position of a 16-byte chunk of a token's activations in shared memory. The 8 lanes of a quarter warp read four chunks of
// two rows at once; swizzled, they touch each of the 32 banks once, without padding between rows.
#include <exl/platform.cuh>

EXL_DEVICE int swizzled_chunk(int chunk, int row) { return chunk ^ ((row & 1) << 2); }
