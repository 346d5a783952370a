// Causal grouped-query attention on tensor cores: forward and backward in bf16 with float sums. Scores exist one tile at a time in
// registers, never in memory.
//
// Layouts: qkv and d_qkv [batch * seq, (heads + 2 kv_heads) * D], a row holding all query heads, then key heads, then value heads;
// out and d_out [batch * seq, heads * D]; lse and row_sums [batch, heads, seq] float. Head widths: template parameter D.
// Tiles lie in shared memory with 8 elements of padding per row, so that the eight rows of a matrix that ldmatrix reads start in
// different banks. Copies of the next tile run while the present one is computed.
//
// Source: Dao et al. 2022 (algorithm 1) and Dao 2023 (section 3.1, algorithm 2). The backward pass is split in two kernels,
// one that owns keys and one that owns queries, as every sum then has one owner: seven products instead of five, but no atomics, no
// float copy of dQ, and results that repeat bit for bit.
#include "gpu.cuh"

#define WARPS 4
#define THREADS (32 * WARPS)

/// Starts the copy of ROWS rows of one head, from row `first` on; rows beyond the sequence become zero.
template <int D, int ROWS>
DEVICE void fetch(bf16* tile, const bf16* head, u64 width, u32 first, u32 seq) {
    constexpr u32 CHUNKS = D / 8;
#pragma unroll
    for (u32 i = 0; i < (ROWS * CHUNKS + THREADS - 1) / THREADS; ++i) {
        const u32 at = i * THREADS + threadIdx.x, row = at / CHUNKS, chunk = at % CHUNKS;
        if (ROWS * CHUNKS % THREADS != 0 && at >= ROWS * CHUNKS) break;
        const bool inside = first + row < seq;
        copy_async(tile + row * (D + 8) + chunk * 8, head + (inside ? (first + row) * width : 0) + chunk * 8, inside);
    }
}

/// Address for `load_matrices` of the left operand: 16 rows from `row`, 16 columns from `col`.
template <int D>
DEVICE const bf16* left(const bf16* tile, u32 row, u32 col) {
    return tile + (row + lane() % 16) * (D + 8) + col + lane() / 16 * 8;
}

/// Of the right operand from rows of its transpose: columns of the product are 16 rows of the tile.
template <int D>
DEVICE const bf16* right(const bf16* tile, u32 row, u32 col) {
    return tile + (row + lane() / 16 * 8 + lane() % 8) * (D + 8) + col + lane() / 8 % 2 * 8;
}

/// Of the right operand as it is, for `load_matrices_transposed`: 16 rows are the sum's index, 16 columns the product's.
template <int D>
DEVICE const bf16* right_plain(const bf16* tile, u32 row, u32 col) {
    return tile + (row + lane() / 8 % 2 * 8 + lane() % 8) * (D + 8) + col + lane() / 16 * 8;
}

/// Two neighbouring tiles of a product as the left operand of the next one.
DEVICE void as_left(u32 (&a)[4], const float (&first)[4], const float (&second)[4]) {
    a[0] = pack(first[0], first[1]);
    a[1] = pack(first[2], first[3]);
    a[2] = pack(second[0], second[1]);
    a[3] = pack(second[2], second[3]);
}

/// Where the heads of one sequence begin.
template <int D>
struct Heads {
    u64 width, attended;
    const bf16 *query, *key, *value;

    DEVICE Heads(const bf16* qkv, u32 sequence, u32 seq, u32 head, u32 kv_head, u32 heads, u32 kv_heads) {
        width = u64(heads + 2 * kv_heads) * D;
        attended = u64(heads) * D;
        const bf16* rows = qkv + sequence * seq * width;
        query = rows + head * D;
        key = rows + (heads + kv_head) * D;
        value = key + kv_heads * D;
    }
};

/// Starts the copy of a tile of K keys and their values into its half of two buffers each.
template <int D, int K>
DEVICE void fetch_keys(bf16* keys, bf16* values, const Heads<D>& of, u32 tile, u32 seq) {
    const u32 half = tile % 2 * K * (D + 8);
    fetch<D, K>(keys + half, of.key, of.width, tile * K, seq);
    fetch<D, K>(values + half, of.value, of.width, tile * K, seq);
}

/// Grid [blocks of queries, heads, batch]. A warp owns M times 16 queries; a tile has K keys. The last queries, which see the most
/// keys, start first. Scores are scaled in the exponent, which is of base two: `scale` holds log2(e).
template <int D, int M, int K>
DEVICE void attention_forward(const bf16* qkv, bf16* out, float* lse, u32 seq, u32 heads, u32 kv_heads, float scale) {
    constexpr u32 QUERIES = WARPS * M * 16;
    DYNAMIC_SHARED(shared);
    bf16* queries = reinterpret_cast<bf16*>(shared);
    bf16* keys = queries + QUERIES * (D + 8);
    bf16* values = keys + 2 * K * (D + 8);
    const u32 head = blockIdx.y, sequence = blockIdx.z;
    const Heads<D> of(qkv, sequence, seq, head, head / (heads / kv_heads), heads, kv_heads);
    const u32 first = (gridDim.x - 1 - blockIdx.x) * QUERIES;
    const u32 own = warp() * M * 16, g = lane() / 4, t = lane() % 4;
    const u32 end = first + QUERIES < seq ? first + QUERIES : seq, tiles = (end + K - 1) / K;

    float o[M][D / 8][4] = {}, largest[M][2], sum[M][2] = {};
#pragma unroll
    for (int m = 0; m < M; ++m) largest[m][0] = largest[m][1] = -infinity();

    fetch<D, QUERIES>(queries, of.query, of.width, first, seq);
    fetch_keys<D, K>(keys, values, of, 0, seq);
    copies_commit();
    for (u32 tile = 0; tile < tiles; ++tile) {
        const u32 start = tile * K;
        copies_wait<0>();
        // This tile is there, and everybody has left the one whose place the next tile takes.
        __syncthreads();
        if (tile + 1 < tiles) fetch_keys<D, K>(keys, values, of, tile + 1, seq);
        copies_commit();
        // Some query of this warp sees the tile.
        if (start < first + own + M * 16) {
            const bf16* k = keys + tile % 2 * K * (D + 8);
            const bf16* v = values + tile % 2 * K * (D + 8);
            float s[M][K / 8][4] = {};
#pragma unroll
            for (int d = 0; d < D / 16; ++d) {
                u32 a[M][4];
#pragma unroll
                for (int m = 0; m < M; ++m) load_matrices(a[m], left<D>(queries, own + m * 16, d * 16));
#pragma unroll
                for (int n = 0; n < K / 16; ++n) {
                    u32 b[4];
                    load_matrices(b, right<D>(k, n * 16, d * 16));
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        mma(s[m][2 * n], a[m], b[0], b[1]);
                        mma(s[m][2 * n + 1], a[m], b[2], b[3]);
                    }
                }
            }
            if (start + K > first + own) {
#pragma unroll
                for (int m = 0; m < M; ++m) {
#pragma unroll
                    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            const u32 key = start + n * 8 + 2 * t + e % 2, query = first + own + m * 16 + g + e / 2 * 8;
                            if (key > query) s[m][n][e] = -infinity();
                        }
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < M; ++m) {
                float rescale[2];
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    float top = largest[m][h];
#pragma unroll
                    for (int n = 0; n < K / 8; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * h], s[m][n][2 * h + 1]));
                    top = fmaxf(top, shuffle_xor(top, 1));
                    top = fmaxf(top, shuffle_xor(top, 2));
                    rescale[h] = power_of_two((largest[m][h] - top) * scale);
                    largest[m][h] = top;
                    float total = 0.0f;
#pragma unroll
                    for (int n = 0; n < K / 8; ++n) {
#pragma unroll
                        for (int e = 2 * h; e < 2 * h + 2; ++e) {
                            s[m][n][e] = power_of_two(s[m][n][e] * scale - top * scale);
                            total += s[m][n][e];
                        }
                    }
                    sum[m][h] = sum[m][h] * rescale[h] + total;
                }
                // Most tiles bring no larger score: their factors are one.
                if (ballot(rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
                    for (int n = 0; n < D / 8; ++n) {
#pragma unroll
                        for (int e = 0; e < 4; ++e) o[m][n][e] *= rescale[e / 2];
                    }
                }
            }
#pragma unroll
            for (int n = 0; n < K / 16; ++n) {
                u32 a[M][4];
#pragma unroll
                for (int m = 0; m < M; ++m) as_left(a[m], s[m][2 * n], s[m][2 * n + 1]);
#pragma unroll
                for (int d = 0; d < D / 16; ++d) {
                    u32 b[4];
                    load_matrices_transposed(b, right_plain<D>(v, n * 16, d * 16));
#pragma unroll
                    for (int m = 0; m < M; ++m) {
                        mma(o[m][2 * d], a[m], b[0], b[1]);
                        mma(o[m][2 * d + 1], a[m], b[2], b[3]);
                    }
                }
            }
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u32 query = first + own + m * 16 + g + 8 * h;
            float total = sum[m][h];
            total += shuffle_xor(total, 1);
            total += shuffle_xor(total, 2);
            if (query >= seq) continue;
            const float inverse = 1.0f / total;
            bf16* row = out + (u64(sequence) * seq + query) * of.attended + head * D + 2 * t;
#pragma unroll
            for (int n = 0; n < D / 8; ++n) {
                *reinterpret_cast<u32*>(row + n * 8) = pack(o[m][n][2 * h] * inverse, o[m][n][2 * h + 1] * inverse);
            }
            if (t == 0) {
                lse[(u64(sequence) * heads + head) * seq + query] =
                    largest[m][h] * scale * 0.6931471805599453f + logf(total);
            }
        }
    }
}

/// The scores of M times 16 rows against N rows, and of the gradients likewise: `s = x y^T`, `ds = dx dy^T`.
template <int D, int M, int N>
DEVICE void score_products(float (&s)[M][N / 8][4], float (&ds)[M][N / 8][4], const bf16* x, const bf16* dx, const bf16* y,
                           const bf16* dy, u32 row) {
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
        u32 a[M][4], b[4];
#pragma unroll
        for (int m = 0; m < M; ++m) load_matrices(a[m], left<D>(x, row + m * 16, d * 16));
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            load_matrices(b, right<D>(y, n * 16, d * 16));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma(s[m][2 * n], a[m], b[0], b[1]);
                mma(s[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
#pragma unroll
        for (int m = 0; m < M; ++m) load_matrices(a[m], left<D>(dx, row + m * 16, d * 16));
#pragma unroll
        for (int n = 0; n < N / 16; ++n) {
            load_matrices(b, right<D>(dy, n * 16, d * 16));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma(ds[m][2 * n], a[m], b[0], b[1]);
                mma(ds[m][2 * n + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/// `into += s y` for M times 16 rows of s and N rows of y.
template <int D, int M, int N>
DEVICE void accumulate(float (&into)[M][D / 8][4], const float (&s)[M][N / 8][4], const bf16* y) {
#pragma unroll
    for (int n = 0; n < N / 16; ++n) {
        u32 a[M][4];
#pragma unroll
        for (int m = 0; m < M; ++m) as_left(a[m], s[m][2 * n], s[m][2 * n + 1]);
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            u32 b[4];
            load_matrices_transposed(b, right_plain<D>(y, n * 16, d * 16));
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma(into[m][2 * d], a[m], b[0], b[1]);
                mma(into[m][2 * d + 1], a[m], b[2], b[3]);
            }
        }
    }
}

/// Writes 16 rows of a result of which the thread holds rows `row` and `row + 8`; `row` is the address of the first of them.
template <int D>
DEVICE void store_rows(bf16* row, u64 width, const float (&of)[D / 8][4], float factor, bool first, bool second) {
#pragma unroll
    for (int n = 0; n < D / 8; ++n) {
        if (first) *reinterpret_cast<u32*>(row + n * 8) = pack(of[n][0] * factor, of[n][1] * factor);
        if (second) *reinterpret_cast<u32*>(row + 8 * width + n * 8) = pack(of[n][2] * factor, of[n][3] * factor);
    }
}

#define LOG2_E 1.4426950408889634f

/// dK and dV. Grid [blocks of keys, kv_heads, batch]: a warp owns M times 16 keys and meets all queries that see them, Q at a time, of
/// all heads of its group. Tiles are transposed, [keys, queries], so that P^T and dS^T are left operands as they are. The
/// first keys, which most queries see, start first.
template <int D, int M, int Q>
DEVICE void attention_backward_keys(const bf16* qkv, const bf16* d_out, const float* lse, const float* row_sums, bf16* d_qkv,
                                    u32 seq, u32 heads, u32 kv_heads, float scale) {
    constexpr u32 KEYS = WARPS * M * 16;
    DYNAMIC_SHARED(shared);
    bf16* keys = reinterpret_cast<bf16*>(shared);
    bf16* values = keys + KEYS * (D + 8);
    bf16* queries = values + KEYS * (D + 8);
    bf16* slopes = queries + 2 * Q * (D + 8);
    float* logs = reinterpret_cast<float*>(slopes + 2 * Q * (D + 8));
    float* sums = logs + 2 * Q;
    const u32 kv_head = blockIdx.y, sequence = blockIdx.z, group = heads / kv_heads;
    const Heads<D> of(qkv, sequence, seq, kv_head * group, kv_head, heads, kv_heads);
    d_out += sequence * seq * of.attended + kv_head * group * D;
    const u64 statistics = (u64(sequence) * heads + kv_head * group) * seq;
    const u32 first = blockIdx.x * KEYS, own = first + warp() * M * 16, g = lane() / 4, t = lane() % 4;
    const u32 skipped = first / Q, tiles = (seq + Q - 1) / Q - skipped;

    const auto fetch_queries = [&](u32 step) {
        const u32 head = step / tiles, start = (skipped + step % tiles) * Q, stage = step % 2;
        fetch<D, Q>(queries + stage * Q * (D + 8), of.query + head * D, of.width, start, seq);
        fetch<D, Q>(slopes + stage * Q * (D + 8), d_out + head * D, of.attended, start, seq);
        if (threadIdx.x < Q) {
            const u32 query = start + threadIdx.x;
            const u64 at = statistics + u64(head) * seq + query;
            // An infinite sum gives a query that does not exist no probability.
            logs[stage * Q + threadIdx.x] = query < seq ? lse[at] * LOG2_E : infinity();
            sums[stage * Q + threadIdx.x] = query < seq ? row_sums[at] : 0.0f;
        }
    };

    float d_key[M][D / 8][4] = {}, d_value[M][D / 8][4] = {};
    fetch<D, KEYS>(keys, of.key, of.width, first, seq);
    fetch<D, KEYS>(values, of.value, of.width, first, seq);
    fetch_queries(0);
    copies_commit();
    for (u32 step = 0; step < group * tiles; ++step) {
        copies_wait<0>();
        __syncthreads();
        if (step + 1 < group * tiles) fetch_queries(step + 1);
        copies_commit();
        const u32 start = (skipped + step % tiles) * Q, stage = step % 2;
        // Some query of the tile sees a key of this warp.
        if (start + Q > own) {
            const bf16* q = queries + stage * Q * (D + 8);
            const bf16* d = slopes + stage * Q * (D + 8);
            float p[M][Q / 8][4] = {}, ds[M][Q / 8][4] = {};
            score_products<D, M, Q>(p, ds, keys, values, q, d, own - first);
            // Not every query of the tile sees every key.
            const bool partly = start + 1 < own + M * 16;
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int n = 0; n < Q / 8; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const u32 column = n * 8 + 2 * t + e % 2, key = own + m * 16 + g + e / 2 * 8;
                        const float seen = power_of_two(p[m][n][e] * (scale * LOG2_E) - logs[stage * Q + column]);
                        p[m][n][e] = partly && key > start + column ? 0.0f : seen;
                        ds[m][n][e] = p[m][n][e] * (ds[m][n][e] - sums[stage * Q + column]);
                    }
                }
            }
            accumulate<D, M, Q>(d_value, p, d);
            accumulate<D, M, Q>(d_key, ds, q);
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
        const u32 key = own + m * 16 + g;
        bf16* row = d_qkv + (u64(sequence) * seq + key) * of.width + (heads + kv_head) * D + 2 * t;
        store_rows<D>(row, of.width, d_key[m], scale, key < seq, key + 8 < seq);
        store_rows<D>(row + kv_heads * D, of.width, d_value[m], 1.0f, key < seq, key + 8 < seq);
    }
}

/// dQ. Grid [blocks of queries, heads, batch]: a warp owns M times 16 queries and meets the keys that they see, K at a time.
template <int D, int M, int K>
DEVICE void attention_backward_queries(const bf16* qkv, const bf16* d_out, const float* lse, const float* row_sums,
                                       bf16* d_qkv, u32 seq, u32 heads, u32 kv_heads, float scale) {
    constexpr u32 QUERIES = WARPS * M * 16;
    DYNAMIC_SHARED(shared);
    bf16* queries = reinterpret_cast<bf16*>(shared);
    bf16* slopes = queries + QUERIES * (D + 8);
    bf16* keys = slopes + QUERIES * (D + 8);
    bf16* values = keys + 2 * K * (D + 8);
    const u32 head = blockIdx.y, sequence = blockIdx.z;
    const Heads<D> of(qkv, sequence, seq, head, head / (heads / kv_heads), heads, kv_heads);
    d_out += sequence * seq * of.attended + head * D;
    const u32 first = (gridDim.x - 1 - blockIdx.x) * QUERIES;
    const u32 own = first + warp() * M * 16, g = lane() / 4, t = lane() % 4;
    const u32 end = first + QUERIES < seq ? first + QUERIES : seq, tiles = (end + K - 1) / K;
    float logs[M][2], sums[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const u32 query = own + m * 16 + g + 8 * h;
            const u64 at = (u64(sequence) * heads + head) * seq + query;
            logs[m][h] = query < seq ? lse[at] * LOG2_E : infinity();
            sums[m][h] = query < seq ? row_sums[at] : 0.0f;
        }
    }

    float d_query[M][D / 8][4] = {};
    fetch<D, QUERIES>(queries, of.query, of.width, first, seq);
    fetch<D, QUERIES>(slopes, d_out, of.attended, first, seq);
    fetch_keys<D, K>(keys, values, of, 0, seq);
    copies_commit();
    for (u32 tile = 0; tile < tiles; ++tile) {
        const u32 start = tile * K;
        copies_wait<0>();
        // This tile is there, and everybody has left the one whose place the next tile takes.
        __syncthreads();
        if (tile + 1 < tiles) fetch_keys<D, K>(keys, values, of, tile + 1, seq);
        copies_commit();
        // Some query of this warp sees the tile.
        if (start < own + M * 16) {
            const bf16* k = keys + tile % 2 * K * (D + 8);
            const bf16* v = values + tile % 2 * K * (D + 8);
            float p[M][K / 8][4] = {}, ds[M][K / 8][4] = {};
            score_products<D, M, K>(p, ds, queries, slopes, k, v, own - first);
            const bool partly = start + K > own + 1;
#pragma unroll
            for (int m = 0; m < M; ++m) {
#pragma unroll
                for (int n = 0; n < K / 8; ++n) {
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const u32 key = start + n * 8 + 2 * t + e % 2, query = own + m * 16 + g + e / 2 * 8;
                        const float seen = power_of_two(p[m][n][e] * (scale * LOG2_E) - logs[m][e / 2]);
                        ds[m][n][e] = partly && key > query ? 0.0f : seen * (ds[m][n][e] - sums[m][e / 2]);
                    }
                }
            }
            accumulate<D, M, K>(d_query, ds, k);
        }
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {
        const u32 query = own + m * 16 + g;
        bf16* row = d_qkv + (u64(sequence) * seq + query) * of.width + head * D + 2 * t;
        store_rows<D>(row, of.width, d_query[m], scale, query < seq, query + 8 < seq);
    }
}

#define ATTENTION(D, M, K, MK, Q, MQ, KQ)                                                                                 \
    KERNEL(THREADS, 1)                                                                                                     \
    attention_forward_##D(const bf16* qkv, bf16* out, float* lse, u32 seq, u32 heads, u32 kv_heads, float scale) {         \
        attention_forward<D, M, K>(qkv, out, lse, seq, heads, kv_heads, scale);                                            \
    }                                                                                                                      \
    KERNEL(THREADS, 1)                                                                                                     \
    attention_backward_keys_##D(const bf16* qkv, const bf16* d_out, const float* lse, const float* row_sums, bf16* d_qkv,  \
                                u32 seq, u32 heads, u32 kv_heads, float scale) {                                           \
        attention_backward_keys<D, MK, Q>(qkv, d_out, lse, row_sums, d_qkv, seq, heads, kv_heads, scale);                  \
    }                                                                                                                      \
    KERNEL(THREADS, 1)                                                                                                     \
    attention_backward_queries_##D(const bf16* qkv, const bf16* d_out, const float* lse, const float* row_sums,            \
                                   bf16* d_qkv, u32 seq, u32 heads, u32 kv_heads, float scale) {                           \
        attention_backward_queries<D, MQ, KQ>(qkv, d_out, lse, row_sums, d_qkv, seq, heads, kv_heads, scale);              \
    }

// Width, and tiles as `Tiles` in src/cuda/attention.rs has them: of the forward pass, of the pass that owns keys and of the one that
// owns queries, each with what a warp owns, in sixteens, and what it meets at a time. A matrix that was read from shared memory serves
// two products per sixteen rows owned, so warps own 32 rows wherever the sums fit in registers.
ATTENTION(32, 2, 64, 2, 64, 2, 64)
ATTENTION(64, 2, 64, 2, 32, 2, 32)
ATTENTION(96, 2, 32, 1, 32, 2, 32)
ATTENTION(128, 2, 64, 1, 32, 2, 32)
