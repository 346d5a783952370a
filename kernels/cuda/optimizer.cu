// AdamW with clipping by the global gradient norm, and the sums of squares that the norm is made of.
//
// Layouts: flat float arrays; `rounded` (may be null) receives the updated parameters as bf16. A unit's parameters lie in one flat
// buffer, so one launch updates all tensors of a unit that share their weight decay. The squared norm is read from device
// memory: no step waits for the host.
// Source: Loshchilov & Hutter 2019, decoupled weight decay; clipping as PyTorch's clip_grad_norm_ (coefficient
// clip / (norm + 1e-6), at most 1). A norm that is not a number stays visible in the result.
#include "gpu.cuh"

/// What an update multiplies by: gradients are scaled by `coefficient` first, bias corrections are folded into rate and root.
struct Factors {
    float beta1, beta2, decay, rate, root, epsilon;

    /// Updates one parameter and its moments. Both kernels round the same way.
    DEVICE void step(float& p, float gradient, float& m, float& v) const {
        m = beta1 * (m - gradient) + gradient;
        v = beta2 * (v - gradient * gradient) + gradient * gradient;
        p = decay * p - rate * m / (sqrtf(v) * root + epsilon);
    }
};

template <int N>
DEVICE void update(float* parameters, float* gradients, float* first, float* second, bf16* rounded, const double* norm,
                   u64 len, float clip, Factors factors) {
    const u64 at = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= len) return;
    float coefficient = 1.0f;
    if (clip >= 0.0f) {
        const double limit = double(clip) / (sqrt(norm[0]) + 1e-6);
        coefficient = limit >= 1.0 ? 1.0f : float(limit);
    }
    Pack<float, N> p = load<N>(parameters + at), g = load<N>(gradients + at);
    Pack<float, N> m = load<N>(first + at), v = load<N>(second + at);
    Pack<bf16, N> r;
    for (int i = 0; i < N; ++i) {
        factors.step(p.of[i], g.of[i] * coefficient, m.of[i], v.of[i]);
        g.of[i] = 0.0f;
        r.of[i] = from_float<bf16>(p.of[i]);
    }
    store(parameters + at, p);
    store(gradients + at, g);
    store(first + at, m);
    store(second + at, v);
    if (rounded) store(rounded + at, r);
}

/// The unclipped update on trial: `kept` receives the parameters as they were; moments and gradients stay.
template <int N>
DEVICE void update_ahead(float* parameters, float* kept, const float* gradients, const float* first, const float* second,
                         u64 len, Factors factors) {
    const u64 at = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    if (at >= len) return;
    Pack<float, N> p = load<N>(parameters + at), m = load<N>(first + at), v = load<N>(second + at);
    const Pack<float, N> g = load<N>(gradients + at);
    store(kept + at, p);
    // The same product as with a coefficient of one.
    for (int i = 0; i < N; ++i) factors.step(p.of[i], g.of[i] * 1.0f, m.of[i], v.of[i]);
    store(parameters + at, p);
}

#define ADAMW(N, suffix)                                                                                                   \
    KERNEL(256, 4)                                                                                                         \
    adamw##suffix(float* parameters, float* gradients, float* first, float* second, bf16* rounded, const double* norm,     \
                  u64 len, float clip, float beta1, float beta2, float decay, float rate, float root, float epsilon) {     \
        update<N>(parameters, gradients, first, second, rounded, norm, len, clip,                                          \
                  Factors{beta1, beta2, decay, rate, root, epsilon});                                                      \
    }                                                                                                                      \
    KERNEL(256, 4)                                                                                                         \
    adamw_ahead##suffix(float* parameters, float* kept, const float* gradients, const float* first, const float* second,   \
                        u64 len, float beta1, float beta2, float decay, float rate, float root, float epsilon) {           \
        update_ahead<N>(parameters, kept, gradients, first, second, len, Factors{beta1, beta2, decay, rate, root, epsilon}); \
    }

ADAMW(4, _wide)
ADAMW(1, )

/// partial[block] = the block's part of the sum of squares. The grid does not depend on the machine, so neither does the sum.
KERNEL(256, 4) square_parts(const float* x, double* partial, u64 len) {
    double sum = 0.0;
    for (u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x; i < len; i += u64(gridDim.x) * blockDim.x) {
        sum += double(x[i]) * double(x[i]);
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

/// One block: out[0] += the sum of the parts.
KERNEL(256, 1) add_parts(const double* partial, double* out, u32 parts) {
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < parts; i += blockDim.x) sum += partial[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) out[0] += sum;
}

/// into += x, in double precision: the squared norms of several ranks.
KERNEL(256, 4) add_f64(const double* x, double* into, u64 len) {
    const u64 i = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < len) into[i] += x[i];
}
