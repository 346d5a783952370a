// Causal grouped-query attention for any head width up to 256 and both element types, without tensor cores: one warp per query or
// key. It serves float, and bf16 of unusual widths; `attention.cu` is the fast path.
//
// Layouts as in attention.cu. Lane `l` holds elements l, l + 32, ... of a head. Sums are float, each has one owner.
// Source: Dao et al. 2022 (algorithm 1), Dao 2023 (algorithm 2).
#include "gpu.cuh"

#define WARPS 4
#define THREADS (32 * WARPS)
/// Elements of a head that a lane holds.
#define HELD 8

template <typename T>
DEVICE void take(float (&into)[HELD], const T* head, u32 dim) {
#pragma unroll
    for (u32 i = 0; i < HELD; ++i) into[i] = lane() + 32 * i < dim ? to_float(head[lane() + 32 * i]) : 0.0f;
}

template <typename T>
DEVICE void give(T* head, const float (&from)[HELD], u32 dim, float factor) {
#pragma unroll
    for (u32 i = 0; i < HELD; ++i) {
        if (lane() + 32 * i < dim) head[lane() + 32 * i] = from_float<T>(from[i] * factor);
    }
}

DEVICE float dot(const float (&a)[HELD], const float (&b)[HELD]) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; ++i) sum += a[i] * b[i];
    return warp_sum(sum);
}

DEVICE void add_scaled(float (&into)[HELD], float factor, const float (&x)[HELD]) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) into[i] += factor * x[i];
}

/// Sizes, and where things lie.
struct Shape {
    u32 seq, heads, kv_heads, dim;

    DEVICE u64 width() const { return u64(heads + 2 * kv_heads) * dim; }
    /// Offset of column `column` (in heads) of a token in qkv.
    DEVICE u64 fused(u32 sequence, u32 token, u32 column) const {
        return (u64(sequence) * seq + token) * width() + u64(column) * dim;
    }
    /// Offset of a head of a token in out.
    DEVICE u64 attended(u32 sequence, u32 token, u32 head) const {
        return ((u64(sequence) * seq + token) * heads + head) * dim;
    }
    /// Offset of a query in lse and row_sums.
    DEVICE u64 statistic(u32 sequence, u32 token, u32 head) const { return (u64(sequence) * heads + head) * seq + token; }
};

/// Grid [queries / WARPS, heads, batch].
template <typename T>
DEVICE void plain_forward(const T* qkv, T* out, float* lse, Shape of, float scale) {
    const u32 query = blockIdx.x * WARPS + warp(), head = blockIdx.y, sequence = blockIdx.z;
    if (query >= of.seq) return;
    const u32 key_column = of.heads + head / (of.heads / of.kv_heads), value_column = key_column + of.kv_heads;
    float q[HELD], x[HELD], o[HELD] = {}, largest = -infinity(), sum = 0.0f;
    take(q, qkv + of.fused(sequence, query, head), of.dim);
    for (u32 key = 0; key <= query; ++key) {
        take(x, qkv + of.fused(sequence, key, key_column), of.dim);
        const float score = dot(q, x) * scale;
        if (score > largest) {
            const float rescale = expf(largest - score);
            sum *= rescale;
#pragma unroll
            for (int i = 0; i < HELD; ++i) o[i] *= rescale;
            largest = score;
        }
        const float p = expf(score - largest);
        sum += p;
        take(x, qkv + of.fused(sequence, key, value_column), of.dim);
        add_scaled(o, p, x);
    }
    give(out + of.attended(sequence, query, head), o, of.dim, 1.0f / sum);
    if (lane() == 0) lse[of.statistic(sequence, query, head)] = largest + logf(sum);
}

/// Sums of d_out * out. Grid [tokens / WARPS, heads, batch].
template <typename T>
DEVICE void row_sums(const T* out, const T* d_out, float* sums, u32 seq, u32 heads, u32 dim) {
    const Shape of{seq, heads, 1, dim};
    const u32 query = blockIdx.x * WARPS + warp(), head = blockIdx.y, sequence = blockIdx.z;
    if (query >= seq) return;
    float o[HELD], d[HELD];
    take(o, out + of.attended(sequence, query, head), dim);
    take(d, d_out + of.attended(sequence, query, head), dim);
    const float sum = dot(o, d);
    if (lane() == 0) sums[of.statistic(sequence, query, head)] = sum;
}

/// dQ. Grid [queries / WARPS, heads, batch].
template <typename T>
DEVICE void plain_backward_queries(const T* qkv, const T* d_out, const float* lse, const float* sums, T* d_qkv, Shape of,
                                   float scale) {
    const u32 query = blockIdx.x * WARPS + warp(), head = blockIdx.y, sequence = blockIdx.z;
    if (query >= of.seq) return;
    const u32 key_column = of.heads + head / (of.heads / of.kv_heads), value_column = key_column + of.kv_heads;
    float q[HELD], d[HELD], k[HELD], v[HELD], d_query[HELD] = {};
    take(q, qkv + of.fused(sequence, query, head), of.dim);
    take(d, d_out + of.attended(sequence, query, head), of.dim);
    const float log = lse[of.statistic(sequence, query, head)], sum = sums[of.statistic(sequence, query, head)];
    for (u32 key = 0; key <= query; ++key) {
        take(k, qkv + of.fused(sequence, key, key_column), of.dim);
        take(v, qkv + of.fused(sequence, key, value_column), of.dim);
        const float p = expf(dot(q, k) * scale - log);
        add_scaled(d_query, p * (dot(d, v) - sum), k);
    }
    give(d_qkv + of.fused(sequence, query, head), d_query, of.dim, scale);
}

/// dK and dV. Grid [keys / WARPS, kv_heads, batch].
template <typename T>
DEVICE void plain_backward_keys(const T* qkv, const T* d_out, const float* lse, const float* sums, T* d_qkv, Shape of,
                                float scale) {
    const u32 key = blockIdx.x * WARPS + warp(), kv_head = blockIdx.y, sequence = blockIdx.z;
    if (key >= of.seq) return;
    const u32 key_column = of.heads + kv_head, value_column = key_column + of.kv_heads, group = of.heads / of.kv_heads;
    float q[HELD], d[HELD], k[HELD], v[HELD], d_key[HELD] = {}, d_value[HELD] = {};
    take(k, qkv + of.fused(sequence, key, key_column), of.dim);
    take(v, qkv + of.fused(sequence, key, value_column), of.dim);
    for (u32 head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (u32 query = key; query < of.seq; ++query) {
            take(q, qkv + of.fused(sequence, query, head), of.dim);
            take(d, d_out + of.attended(sequence, query, head), of.dim);
            const u64 statistic = of.statistic(sequence, query, head);
            const float p = expf(dot(q, k) * scale - lse[statistic]);
            add_scaled(d_value, p, d);
            add_scaled(d_key, p * (dot(d, v) - sums[statistic]), q);
        }
    }
    give(d_qkv + of.fused(sequence, key, key_column), d_key, of.dim, scale);
    give(d_qkv + of.fused(sequence, key, value_column), d_value, of.dim, 1.0f);
}

#define PLAIN(T, suffix)                                                                                                   \
    KERNEL(THREADS, 4)                                                                                                     \
    plain_forward_##suffix(const T* qkv, T* out, float* lse, u32 seq, u32 heads, u32 kv_heads, u32 dim, float scale) {     \
        plain_forward<T>(qkv, out, lse, Shape{seq, heads, kv_heads, dim}, scale);                                          \
    }                                                                                                                      \
    KERNEL(THREADS, 4)                                                                                                     \
    row_sums_##suffix(const T* out, const T* d_out, float* sums, u32 seq, u32 heads, u32 dim) {                            \
        row_sums<T>(out, d_out, sums, seq, heads, dim);                                                                    \
    }                                                                                                                      \
    KERNEL(THREADS, 4)                                                                                                     \
    plain_backward_queries_##suffix(const T* qkv, const T* d_out, const float* lse, const float* sums, T* d_qkv, u32 seq,  \
                                    u32 heads, u32 kv_heads, u32 dim, float scale) {                                       \
        plain_backward_queries<T>(qkv, d_out, lse, sums, d_qkv, Shape{seq, heads, kv_heads, dim}, scale);                  \
    }                                                                                                                      \
    KERNEL(THREADS, 4)                                                                                                     \
    plain_backward_keys_##suffix(const T* qkv, const T* d_out, const float* lse, const float* sums, T* d_qkv, u32 seq,     \
                                 u32 heads, u32 kv_heads, u32 dim, float scale) {                                          \
        plain_backward_keys<T>(qkv, d_out, lse, sums, d_qkv, Shape{seq, heads, kv_heads, dim}, scale);                     \
    }

PLAIN(float, f32)
PLAIN(bf16, bf16)
