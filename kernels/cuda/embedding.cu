// Token and position embedding, and its gradient.
//
// Layouts: tokens [rows], table [limit, cols], positions [>= seq, cols], out and d_out [rows, cols]; d_table and d_positions as the
// table, float or bf16. The gradient adds rows of one token in their order, in float and without atomics, so that it repeats bit for bit
// and is rounded once. A token beyond the table makes its row NaN: a kernel cannot refuse it, and the loss then shows it.
#include "gpu.cuh"

/// One block per row.
template <typename T>
DEVICE void embed(const u32* tokens, const T* table, const T* positions, T* out, u32 cols, u32 seq, u32 limit) {
    const u32 row = blockIdx.x, token = tokens[row];
    for (u32 col = threadIdx.x; col < cols; col += blockDim.x) {
        float x = token < limit ? to_float(table[u64(token) * cols + col]) : not_a_number();
        if (positions) x += to_float(positions[u64(row % seq) * cols + col]);
        out[u64(row) * cols + col] = from_float<T>(x);
    }
}

#define TOKENS 256
/// Columns that a thread holds.
#define HELD 8

/// Grid [rows, columns / (TOKENS * HELD)], blocks of TOKENS threads. The first row of a token gathers from all rows of that token;
/// the others leave.
template <typename T, typename G>
DEVICE void embed_backward(const u32* tokens, const T* d_out, G* d_table, u32 rows, u32 cols, u32 limit) {
    __shared__ u32 matches[TOKENS], counts[TOKENS / 32];
    const u32 row = blockIdx.x, token = tokens[row], first = blockIdx.y * TOKENS * HELD + threadIdx.x;
    bool seen = token >= limit;
    for (u32 other = threadIdx.x; other < row; other += TOKENS) seen |= tokens[other] == token;
    if (any_in_block(seen)) return;
    float sums[HELD] = {};
    for (u32 start = row; start < rows; start += TOKENS) {
        const u32 other = start + threadIdx.x;
        const bool mine = other < rows && tokens[other] == token;
        const u32 lanes = ballot(mine);
        __syncthreads();
        if (lane() == 0) counts[warp()] = count_bits(lanes);
        __syncthreads();
        u32 before = 0, all = 0;
        for (u32 i = 0; i < TOKENS / 32; ++i) {
            if (i < warp()) before += counts[i];
            all += counts[i];
        }
        if (mine) matches[before + count_bits(lanes & ((1u << lane()) - 1u))] = other;
        __syncthreads();
#pragma unroll 2
        for (u32 i = 0; i < all; ++i) {
            const T* slopes = d_out + u64(matches[i]) * cols;
#pragma unroll
            for (u32 n = 0; n < HELD; ++n) {
                if (first + n * TOKENS < cols) sums[n] += to_float(slopes[first + n * TOKENS]);
            }
        }
    }
    G* into = d_table + u64(token) * cols;
#pragma unroll
    for (u32 n = 0; n < HELD; ++n) {
        const u32 col = first + n * TOKENS;
        if (col < cols) into[col] = from_float<G>(to_float(into[col]) + sums[n]);
    }
}

/// One thread per position and column.
template <typename T, typename G>
DEVICE void positions_backward(const T* d_out, G* d_positions, u32 rows, u32 cols, u32 seq) {
    const u64 at = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    const u64 stride = u64(seq) * cols;
    if (at >= stride) return;
    float sum = to_float(d_positions[at]);
    for (u64 i = at; i < u64(rows) * cols; i += stride) sum += to_float(d_out[i]);
    d_positions[at] = from_float<G>(sum);
}

#define EMBEDDINGS(T, suffix)                                                                                              \
    KERNEL(256, 4)                                                                                                         \
    embed_##suffix(const u32* tokens, const T* table, const T* positions, T* out, u32 cols, u32 seq, u32 limit) {          \
        embed<T>(tokens, table, positions, out, cols, seq, limit);                                                         \
    }

/// Gradients in G from values in T.
#define EMBEDDING_GRADIENTS(T, G, narrow, suffix)                                                                          \
    KERNEL(TOKENS, 4)                                                                                                      \
    embed_backward##narrow##_##suffix(const u32* tokens, const T* d_out, G* d_table, u32 rows, u32 cols, u32 limit) {      \
        embed_backward<T, G>(tokens, d_out, d_table, rows, cols, limit);                                                   \
    }                                                                                                                      \
    KERNEL(256, 4)                                                                                                         \
    positions_backward##narrow##_##suffix(const T* d_out, G* d_positions, u32 rows, u32 cols, u32 seq) {                   \
        positions_backward<T, G>(d_out, d_positions, rows, cols, seq);                                                     \
    }

EMBEDDINGS(float, f32)
EMBEDDINGS(bf16, bf16)
EMBEDDING_GRADIENTS(float, float, , f32)
EMBEDDING_GRADIENTS(bf16, float, , bf16)
EMBEDDING_GRADIENTS(bf16, bf16, _narrow, bf16)
