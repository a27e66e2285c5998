#pragma once
// Where each element lies in the operand registers of mma.m16n8k16, and in which order exl feeds K to it. Plain
// functions of plain integers: kernels, the host shim's tests and the Python packer evaluate the same maps.
// Source: "Parallel Thread Execution ISA", section on mma.m16n8k16 with 16-bit inputs.
#include <exl/platform.cuh>

// Lane l = 4 g + t. Element e of an operand is half e % 2 of register e / 2.
EXL_DEVICE constexpr int frag_g(int lane) { return lane / 4; }
EXL_DEVICE constexpr int frag_t(int lane) { return lane % 4; }

EXL_DEVICE constexpr int frag_a_row(int lane, int e) { return lane / 4 + 8 * (e / 2 % 2); }             // e 0..7
EXL_DEVICE constexpr int frag_a_col(int lane, int e) { return lane % 4 * 2 + e % 2 + 8 * (e / 4); }
EXL_DEVICE constexpr int frag_b_row(int lane, int e) { return lane % 4 * 2 + e % 2 + 8 * (e / 2); }     // e 0..3
EXL_DEVICE constexpr int frag_b_col(int lane, int) { return lane / 4; }
EXL_DEVICE constexpr int frag_c_row(int lane, int e) { return lane / 4 + 8 * (e / 2); }                 // e 0..3
EXL_DEVICE constexpr int frag_c_col(int lane, int e) { return lane % 4 * 2 + e % 2; }

// A matrix product does not care in which order K is summed if both operands agree. exl's order makes 16 bytes of
// activations two B fragments: of 32 inputs, lane t of each quad owns inputs 8t .. 8t+7, and mma j (0, 1) takes
// 8t+4j .. 8t+4j+3 of them. Input that element e (0..3) of lane t's share is, in mma j:
EXL_DEVICE constexpr int k_of_element(int t, int j, int e) { return 8 * t + 4 * j + e; }
