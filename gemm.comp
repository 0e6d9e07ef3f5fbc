// SPDX-License-Identifier: MIT
//
// C = op(A) op(B) in float32, for matrices of any size.
//
// This program runs once for each *invocation* (a GPU thread). 16 x 16 invocations form a *workgroup*; a
// workgroup makes one 64 x 64 block of C, and each of its invocations a 4 x 4 block within that. The host
// starts as many workgroups as it takes to cover C.
//
// Why tiles. The plain way, each element of C as a dot product read from memory, reads every element of A
// N times and every element of B M times, and a GPU waits for memory far longer than for arithmetic. So the
// workgroup walks along K in steps of 16: its invocations together copy a 64 x 16 tile of A and a 16 x 64
// tile of B into *shared memory*, which is small, fast and common to the workgroup, and then all of them use
// the copies. Each element fetched from far away is used 64 times.
//
// Why registers. Shared memory is still slower than arithmetic. An invocation that makes one element of C
// reads two numbers for each multiplication; one that makes 4 x 4 reads 8 numbers (4 from a column of A's
// tile, 4 from a row of B's tile) for 16 multiplications, and keeps its 16 sums in registers all along.
//
// Why barriers. Invocations run in no particular order. barrier() makes each wait for all of its workgroup:
// once so that nobody reads a tile before it is complete, once so that nobody overwrites it too early.
#version 450

layout(local_size_x = 8, local_size_y = 8) in;

layout(std430, binding = 0) readonly buffer BufferA { float a[]; };
layout(std430, binding = 1) readonly buffer BufferB { float b[]; };
layout(std430, binding = 2) buffer BufferC { float c[]; };

// Where a matrix is: the position of its first element, then the distance from an element to the next one
// down a column (row stride) and along a row (column stride). All count floats. A transposed matrix is the
// same data with row and column stride swapped.
struct Layout { uint offset, row, column; };

// C is M x N, op(A) is M x K, op(B) is K x N. Push constants are the few numbers sent along with a dispatch.
// A long K takes several dispatches: all but the first have `adds` set, and add to what C holds already.
layout(push_constant) uniform Constants {
    uint M, N, K, adds;
    Layout A, B, C;
};

const uint TILE = 64;          // rows and columns of C for one workgroup
const uint STEP = 16;          // how far along K a tile reaches
const uint INVOCATIONS = 64;

// Both tiles are stored with K as the first index, so that the four numbers an invocation needs for one k
// lie side by side and come as one vec4. The 17th column is padding: shared memory is divided into banks that
// each serve one request at a time, and rows of just 64 floats would put a whole column in the same bank.
shared vec4 tile_a[STEP][2][TILE / 8 + 1];
shared vec4 tile_b[STEP][2][TILE / 8 + 1];

// The invocations share out the elements of a tile. Neighbouring invocations should fetch neighbouring
// addresses, which then come in one piece: so the fast index follows whichever direction has stride 1.
// Outside the matrix the tiles hold 0, which adds nothing to a sum. Elements are never fetched from there,
// and a NaN or an infinity inside the matrix meets such a 0 only in rows and columns that are not stored.
void load_tile_a(uint row0, uint k0) {
    bool along_k = A.column == 1;
    for (uint i = gl_LocalInvocationIndex; i < TILE * STEP; i += INVOCATIONS) {
        uint m = along_k ? i / STEP : i % TILE;
        uint k = along_k ? i % STEP : i / TILE;
        bool inside = row0 + m < M && k0 + k < K;
        tile_a[k][m / 4 % 2][m / 8][m % 4] = inside ? a[A.offset + (row0 + m) * A.row + (k0 + k) * A.column] : 0.0;
    }
}

void load_tile_b(uint column0, uint k0) {
    bool along_k = B.row == 1 && B.column != 1;
    for (uint i = gl_LocalInvocationIndex; i < TILE * STEP; i += INVOCATIONS) {
        uint n = along_k ? i / STEP : i % TILE;
        uint k = along_k ? i % STEP : i / TILE;
        bool inside = column0 + n < N && k0 + k < K;
        tile_b[k][n / 4 % 2][n / 8][n % 4] = inside ? b[B.offset + (k0 + k) * B.row + (column0 + n) * B.column] : 0.0;
    }
}

// Four neighbouring elements of C; those outside of it are dropped.
void store(uint row, uint column, vec4 sums) {
    if (row >= M) return;
    for (uint i = 0; i < 4 && column + i < N; i++) {
        uint place = C.offset + row * C.row + (column + i) * C.column;
        c[place] = adds != 0 ? c[place] + sums[i] : sums[i];
    }
}

void main() {
    uint x = gl_LocalInvocationID.x, y = gl_LocalInvocationID.y;
    uint row0 = gl_WorkGroupID.y * TILE, column0 = gl_WorkGroupID.x * TILE;

    uint row = row0 + 8 * y, column = column0 + 8 * x;
    bool inside = row < M && column < N;
    vec4 sums[8][2];
    for (uint i = 0; i < 8; i++) sums[i][0] = sums[i][1] = vec4(0);

    for (uint k0 = 0; k0 < K; k0 += STEP) {
        load_tile_a(row0, k0);
        load_tile_b(column0, k0);
        barrier();  // the tiles are complete
        if (inside) for (uint k = 0; k < STEP; k++) {
            vec4 a0 = tile_a[k][0][y], a1 = tile_a[k][1][y], b0 = tile_b[k][0][x], b1 = tile_b[k][1][x];
            for (uint i = 0; i < 4; i++) {
                sums[i][0] += a0[i] * b0;
                sums[i][1] += a0[i] * b1;
                sums[i + 4][0] += a1[i] * b0;
                sums[i + 4][1] += a1[i] * b1;
            }
        }
        barrier();  // nobody needs the tiles any more
    }

    for (uint i = 0; i < 4; i++) {
        store(row + i, column, sums[i][0]);
        store(row + i, column + 4, sums[i][1]);
        store(row + i + 4, column, sums[i + 4][0]);
        store(row + i + 4, column + 4, sums[i + 4][1]);
    }
}
