#pragma once
// Softcap of attention's scores and of logits.
#include <exl/half.cuh>

constexpr float kLog2E = 1.44269504f;

// softcap * tanh(x / softcap); x if softcap is 0. The error is within some 2^-23 of the cap, not of a small x.
EXL_DEVICE float capped(float x, float softcap) {
  return softcap > 0.0f ? softcap * (1.0f - 2.0f / (1.0f + ex2_approx(2.0f * kLog2E * x / softcap))) : x;
}
