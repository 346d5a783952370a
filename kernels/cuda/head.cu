// Cross-entropy over a chunk of rows of logits, forward and backward; the projections around it are matrix products.
//
// Layouts: logits float, some rows by some of the vocabulary's columns, `stride` elements from one row to the next; targets, lse
// [rows]. Forward leaves the loss of a row in its first logit, which `add_losses` sums. Backward replaces logits by scale * (softmax - onehot):
// as float in place, or as bf16 in the first half of each row, so that the products that follow run on tensor cores with twice the
// stride. A target beyond the vocabulary makes the loss NaN.
// Source: logsumexp with the largest logit subtracted; gradients from the stored lse as in Dao 2023 for attention.
#include "gpu.cuh"

#define THREADS 512

/// One block per row.
KERNEL(THREADS, 2) cross_entropy(float* logits, const u32* targets, float* lse, u32 vocab, u32 stride) {
    float* row = logits + u64(blockIdx.x) * stride;
    float largest = -infinity();
    for (u32 i = threadIdx.x; i < vocab; i += THREADS) largest = fmaxf(largest, row[i]);
    largest = block_max(largest);
    float sum = 0.0f;
    for (u32 i = threadIdx.x; i < vocab; i += THREADS) sum += expf(row[i] - largest);
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        const u32 target = targets[blockIdx.x];
        const float total = largest + logf(sum);
        lse[blockIdx.x] = total;
        row[0] = target < vocab ? total - row[target] : not_a_number();
    }
}

/// One block: loss[0] = (0 or what it was) + weight * the sum of the losses of `rows` rows.
KERNEL(THREADS, 1) add_losses(const float* logits, float* loss, u32 rows, u32 stride, float weight, u32 first) {
    double sum = 0.0;
    for (u32 row = threadIdx.x; row < rows; row += THREADS) sum += double(logits[u64(row) * stride]);
    sum = block_sum(sum);
    if (threadIdx.x == 0) loss[0] = (first ? 0.0f : loss[0]) + float(sum * weight);
}

/// Elements that a thread reads before the block meets.
#define AHEAD 4

/// One block per row, of logits of `cols` tokens of the vocabulary from `first` on. Elements are read, then all threads meet, then
/// they are written: what is written as bf16 lies at or before what was read, never beyond.
template <typename T>
DEVICE void logit_gradient(float* logits, const u32* targets, const float* lse, u32 cols, u32 stride, u32 first,
                           float scale) {
    float* row = logits + u64(blockIdx.x) * stride;
    T* out = reinterpret_cast<T*>(row);
    const u32 target = targets[blockIdx.x] - first;
    const float total = lse[blockIdx.x];
    for (u32 start = 0; start < cols; start += AHEAD * THREADS) {
        float x[AHEAD];
#pragma unroll
        for (u32 n = 0; n < AHEAD; ++n) {
            const u32 i = start + n * THREADS + threadIdx.x;
            x[n] = i < cols ? scale * (expf(row[i] - total) - (i == target ? 1.0f : 0.0f)) : 0.0f;
        }
        __syncthreads();
#pragma unroll
        for (u32 n = 0; n < AHEAD; ++n) {
            const u32 i = start + n * THREADS + threadIdx.x;
            if (i < cols) out[i] = from_float<T>(x[n]);
        }
    }
}

KERNEL(THREADS, 2)
logit_gradient_f32(float* logits, const u32* targets, const float* lse, u32 cols, u32 stride, u32 first, float scale) {
    logit_gradient<float>(logits, targets, lse, cols, stride, first, scale);
}
KERNEL(THREADS, 2)
logit_gradient_bf16(float* logits, const u32* targets, const float* lse, u32 cols, u32 stride, u32 first, float scale) {
    logit_gradient<bf16>(logits, targets, lse, cols, stride, first, scale);
}
