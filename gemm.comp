// SPDX-License-Identifier: MIT
//
// C = A B^T in float32: each element of C is the dot product of a row of A and a row of B.
//
// This program runs once for each *invocation* (a GPU thread). An invocation makes a block of 8 x 8 elements
// of C. 8 x 8 invocations form a *workgroup*, which thus makes 64 x 64 elements, and the host starts as many
// workgroups as it takes to cover C.
//
// Why blocks. Arithmetic is fast and memory is slow. An invocation that made one element would fetch two
// numbers for every multiplication. One that makes 8 x 8 fetches 16 numbers for 64 multiplications, and keeps
// its 64 sums in registers. Registers have no index, so every loop over the block must be unrolled, including
// the two that store it. With 32 numbers of A, an invocation takes about 100 registers. Desktop cards have as
// many. Small mobile ones do not, and keep some of the numbers in memory, which is slower but still right.
//
// Why x runs along the rows. A device runs neighbors along x in step, as one group. Attention makes products
// of many rows and few columns, such as 128 x 16, and along their rows the groups are full. How large a group
// is does not matter, since invocations share nothing: no subgroup operation is used.
//
// Why texel buffers. A and B are read through the units that read textures, four floats (a vec4) at a time.
// Neighboring invocations need the same rows, and find them in the cache of these units. Drivers that run on
// the processor also read this way many times faster than from an array in memory.
#version 450
#extension GL_EXT_control_flow_attributes : enable

layout(local_size_x = 8, local_size_y = 8) in;

layout(binding = 0) uniform samplerBuffer a;
layout(binding = 1) uniform samplerBuffer b;
layout(std430, binding = 2) buffer Result { float c[]; };

// Push constants are the few numbers that are sent along with a dispatch. The host pads the rows of A and B
// with zeros to whole vec4s. Where these are very long, a dispatch sums only a part of each dot product, and
// the following ones add theirs to what C holds already.
layout(push_constant) uniform Constants {
    uint M, N, K;              // C is M x N, and the rows of A and B are K vec4s long
    uint a_first, b_first;     // where A and B begin, in vec4s
    uint c_first;              // where C begins, in floats
    uint pitch;                // the distance from one row of A or B to the next, in vec4s
    uint adds;                 // whether to add to C
};

void main() {
    uint row = 8 * gl_GlobalInvocationID.x, column = 8 * gl_GlobalInvocationID.y;
    if (row >= M || column >= N) return;

    float sums[8][8];
    [[unroll]] for (uint i = 0; i < 8; i++)
        [[unroll]] for (uint j = 0; j < 8; j++)
            sums[i][j] = 0.0;

    // Past the edge of C, the last row of A or B stands in for missing ones. Nothing is stored there.
    for (uint k = 0; k < K; k++) {
        vec4 from_a[8];
        [[unroll]] for (uint i = 0; i < 8; i++)
            from_a[i] = texelFetch(a, int(a_first + min(row + i, M - 1) * pitch + k));
        [[unroll]] for (uint j = 0; j < 8; j++) {
            vec4 from_b = texelFetch(b, int(b_first + min(column + j, N - 1) * pitch + k));
            [[unroll]] for (uint i = 0; i < 8; i++)
                sums[i][j] += dot(from_a[i], from_b);
        }
    }

    [[unroll]] for (uint i = 0; i < 8; i++) {
        [[unroll]] for (uint j = 0; j < 8; j++) {
            if (row + i < M && column + j < N) {
                uint place = c_first + (row + i) * N + column + j;
                c[place] = adds != 0 ? c[place] + sums[i][j] : sums[i][j];
            }
        }
    }
}
