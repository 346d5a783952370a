// RMSNorm and LayerNorm, forward and backward.
//
// Layouts: x, out, dy, dx row-major [rows, cols]; gamma, beta [cols]; stats [rows] (reciprocal deviation) for RMSNorm, [rows, 2]
// (mean, reciprocal deviation) for LayerNorm, always float; d_gamma, d_beta [cols], float or bf16. Sums are float and added in a
// fixed order, so that results repeat bit for bit; what is added to is rounded once.
// Source: Zhang & Sennrich 2019 (RMSNorm), Ba et al. 2016 (LayerNorm). With h = (x - mean) * rstd and g = dy * gamma:
// dx += rstd * (g - avg(g) - h * avg(g * h)), without avg(g) for RMSNorm; d_gamma += sum of dy * h over rows; d_beta += sum of dy.
#include "gpu.cuh"

/// One block per row. N elements at a time: 16 bytes, or one element where rows are not aligned.
template <typename T, int N>
DEVICE void norm_forward(const T* x, const T* gamma, const T* beta, T* out, float* stats, u32 cols, float epsilon) {
    const u64 row = blockIdx.x;
    x += row * cols;
    out += row * cols;
    float mean = 0.0f;
    if (beta) {
        float sum = 0.0f;
        for (u32 col = threadIdx.x * N; col < cols; col += blockDim.x * N) {
            const Pack<T, N> values = load<N>(x + col);
            for (int i = 0; i < N; ++i) sum += to_float(values.of[i]);
        }
        mean = block_sum(sum) / float(cols);
    }
    float squares = 0.0f;
    for (u32 col = threadIdx.x * N; col < cols; col += blockDim.x * N) {
        const Pack<T, N> values = load<N>(x + col);
        for (int i = 0; i < N; ++i) {
            const float centred = to_float(values.of[i]) - mean;
            squares += centred * centred;
        }
    }
    const float rstd = 1.0f / sqrtf(block_sum(squares) / float(cols) + epsilon);
    for (u32 col = threadIdx.x * N; col < cols; col += blockDim.x * N) {
        const Pack<T, N> values = load<N>(x + col), weights = load<N>(gamma + col);
        Pack<T, N> result, shifts = weights;
        if (beta) shifts = load<N>(beta + col);
        for (int i = 0; i < N; ++i) {
            const float h = (to_float(values.of[i]) - mean) * rstd;
            result.of[i] = from_float<T>(h * to_float(weights.of[i]) + (beta ? to_float(shifts.of[i]) : 0.0f));
        }
        store(out + col, result);
    }
    if (threadIdx.x == 0) {
        if (beta) {
            stats[2 * row] = mean;
            stats[2 * row + 1] = rstd;
        } else {
            stats[row] = rstd;
        }
    }
}

/// One block per row; adds to dx.
template <typename T, int N>
DEVICE void norm_backward_input(const T* x, const T* gamma, const float* stats, const T* dy, T* dx, u32 cols,
                                u32 layer_norm) {
    const u64 row = blockIdx.x;
    x += row * cols;
    dy += row * cols;
    dx += row * cols;
    const float mean = layer_norm ? stats[2 * row] : 0.0f;
    const float rstd = layer_norm ? stats[2 * row + 1] : stats[row];
    float along = 0.0f, across = 0.0f;
    for (u32 col = threadIdx.x * N; col < cols; col += blockDim.x * N) {
        const Pack<T, N> values = load<N>(x + col), slopes = load<N>(dy + col), weights = load<N>(gamma + col);
        for (int i = 0; i < N; ++i) {
            const float g = to_float(slopes.of[i]) * to_float(weights.of[i]);
            along += g * ((to_float(values.of[i]) - mean) * rstd);
            across += g;
        }
    }
    along = block_sum(along) / float(cols);
    across = layer_norm ? block_sum(across) / float(cols) : 0.0f;
    for (u32 col = threadIdx.x * N; col < cols; col += blockDim.x * N) {
        const Pack<T, N> values = load<N>(x + col), slopes = load<N>(dy + col), weights = load<N>(gamma + col);
        Pack<T, N> result = load<N>(dx + col);
        for (int i = 0; i < N; ++i) {
            const float g = to_float(slopes.of[i]) * to_float(weights.of[i]);
            const float h = (to_float(values.of[i]) - mean) * rstd;
            result.of[i] = from_float<T>(to_float(result.of[i]) + rstd * (g - across - h * along));
        }
        store(dx + col, result);
    }
}

/// Rows that a block of `column_sums` looks at side by side.
#define ROWS_ASIDE 16

/// Grid [columns / 32, slabs of rows], threads [32, ROWS_ASIDE]. `sums` [slabs, 2, cols]: of dy * h where `weighted`, and of dy.
template <typename T>
DEVICE void column_sums(const T* x, const float* stats, const T* dy, float* sums, u32 rows, u32 cols, u32 weighted,
                        u32 layer_norm) {
    __shared__ float products[ROWS_ASIDE][33], slopes[ROWS_ASIDE][33];
    const u32 col = blockIdx.x * 32 + threadIdx.x, slab = (rows + gridDim.y - 1) / gridDim.y;
    const u32 first = blockIdx.y * slab, end = first + slab < rows ? first + slab : rows;
    float along = 0.0f, across = 0.0f;
    if (col < cols) {
#pragma unroll 4
        for (u32 row = first + threadIdx.y; row < end; row += ROWS_ASIDE) {
            const u64 at = u64(row) * cols + col;
            const float slope = to_float(dy[at]);
            across += slope;
            if (weighted) {
                const float mean = layer_norm ? stats[2 * u64(row)] : 0.0f;
                const float rstd = layer_norm ? stats[2 * u64(row) + 1] : stats[row];
                along += slope * ((to_float(x[at]) - mean) * rstd);
            }
        }
    }
    products[threadIdx.y][threadIdx.x] = along;
    slopes[threadIdx.y][threadIdx.x] = across;
    __syncthreads();
    if (threadIdx.y == 0 && col < cols) {
        along = across = 0.0f;
        for (int row = 0; row < ROWS_ASIDE; ++row) {
            along += products[row][threadIdx.x];
            across += slopes[row][threadIdx.x];
        }
        sums[2 * u64(blockIdx.y) * cols + col] = along;
        sums[(2 * u64(blockIdx.y) + 1) * cols + col] = across;
    }
}

/// One thread per column: adds the slabs' sums to d_gamma and d_beta, where they are given, and rounds once.
template <typename G>
DEVICE void add_column_sums(const float* sums, G* d_gamma, G* d_beta, u32 slabs, u32 cols) {
    const u32 col = blockIdx.x * blockDim.x + threadIdx.x;
    if (col >= cols) return;
    float along = 0.0f, across = 0.0f;
    for (u32 slab = 0; slab < slabs; ++slab) {
        along += sums[2 * u64(slab) * cols + col];
        across += sums[(2 * u64(slab) + 1) * cols + col];
    }
    if (d_gamma) d_gamma[col] = from_float<G>(to_float(d_gamma[col]) + along);
    if (d_beta) d_beta[col] = from_float<G>(to_float(d_beta[col]) + across);
}

#define NORMS(T, N, suffix)                                                                                                \
    KERNEL(256, 4)                                                                                                         \
    norm_forward_##suffix(const T* x, const T* gamma, const T* beta, T* out, float* stats, u32 cols, float epsilon) {       \
        norm_forward<T, N>(x, gamma, beta, out, stats, cols, epsilon);                                                     \
    }                                                                                                                      \
    KERNEL(256, 4)                                                                                                         \
    norm_backward_input_##suffix(const T* x, const T* gamma, const float* stats, const T* dy, T* dx, u32 cols,             \
                                 u32 layer_norm) {                                                                         \
        norm_backward_input<T, N>(x, gamma, stats, dy, dx, cols, layer_norm);                                              \
    }

NORMS(float, 4, f32_wide)
NORMS(float, 1, f32)
NORMS(bf16, 8, bf16_wide)
NORMS(bf16, 1, bf16)

#define COLUMNS(T, suffix)                                                                                                  \
    KERNEL(32 * ROWS_ASIDE, 2)                                                                                             \
    column_sums_##suffix(const T* x, const float* stats, const T* dy, float* sums, u32 rows, u32 cols, u32 weighted,       \
                         u32 layer_norm) {                                                                                 \
        column_sums<T>(x, stats, dy, sums, rows, cols, weighted, layer_norm);                                              \
    }                                                                                                                      \
    KERNEL(256, 4)                                                                                                         \
    add_column_sums_##suffix(const float* sums, T* d_gamma, T* d_beta, u32 slabs, u32 cols) {                              \
        add_column_sums<T>(sums, d_gamma, d_beta, slabs, cols);                                                            \
    }

COLUMNS(float, f32)
COLUMNS(bf16, bf16)
