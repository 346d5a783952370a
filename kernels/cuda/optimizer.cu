// AdamW with clipping by the global gradient norm, and the sums of squares that the norm is made of.
//
// Layouts: flat arrays; parameters and moments are float, gradients float or bf16; `rounded` (may be null) receives the updated
// parameters as bf16. All tensors of a unit lie in one flat array, and one launch updates all of them: `Runs` says which of
// them decay. The squared norm is read from device memory: no step waits for the host.
// Source: Loshchilov & Hutter 2019, decoupled weight decay; clipping as PyTorch's clip_grad_norm_ (coefficient
// clip / (norm + 1e-6), at most 1). A norm that is not a number stays visible in the result.
#include "gpu.cuh"

#define BORDERS 15

/// Which parameters decay: runs that do and runs that do not, in turns, the first as `first` says. A run ends at each border;
/// unused borders lie beyond all elements.
struct Runs {
    u32 borders[BORDERS], first;

    DEVICE bool decays(u32 i) const {
        u32 turn = first;
#pragma unroll
        for (int n = 0; n < BORDERS; ++n) turn ^= u32(i >= borders[n]);
        return turn != 0;
    }
};

/// What an update multiplies by: gradients are scaled by `coefficient` first, bias corrections are folded into rate and root.
struct Factors {
    float beta1, beta2, decay, rate, root, epsilon;

    /// Updates one parameter and its moments. Both kernels round the same way.
    DEVICE void step(float& p, float gradient, float& m, float& v, bool decays) const {
        m = beta1 * (m - gradient) + gradient;
        v = beta2 * (v - gradient * gradient) + gradient * gradient;
        p = (decays ? decay : 1.0f) * p - rate * m / (sqrtf(v) * root + epsilon);
    }
};

template <typename G, int N>
DEVICE void update(float* parameters, G* gradients, float* first, float* second, bf16* rounded, const double* norm, u32 len,
                   float clip, const Runs& runs, const Factors& factors) {
    const u32 at = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (at >= len) return;
    float coefficient = 1.0f;
    if (clip >= 0.0f) {
        const double limit = double(clip) / (sqrt(norm[0]) + 1e-6);
        coefficient = limit >= 1.0 ? 1.0f : float(limit);
    }
    Pack<float, N> p = load<N>(parameters + at), m = load<N>(first + at), v = load<N>(second + at);
    Pack<G, N> g = load<N>(gradients + at);
    Pack<bf16, N> r;
    for (int i = 0; i < N; ++i) {
        factors.step(p.of[i], to_float(g.of[i]) * coefficient, m.of[i], v.of[i], runs.decays(at + i));
        g.of[i] = from_float<G>(0.0f);
        r.of[i] = from_float<bf16>(p.of[i]);
    }
    store(parameters + at, p);
    store(gradients + at, g);
    store(first + at, m);
    store(second + at, v);
    if (rounded) store(rounded + at, r);
}

/// The unclipped update on trial: `kept` receives the parameters as they were; moments and gradients stay.
template <typename G, int N>
DEVICE void update_ahead(float* parameters, float* kept, const G* gradients, const float* first, const float* second, u32 len,
                         const Runs& runs, const Factors& factors) {
    const u32 at = (blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (at >= len) return;
    Pack<float, N> p = load<N>(parameters + at), m = load<N>(first + at), v = load<N>(second + at);
    const Pack<G, N> g = load<N>(gradients + at);
    store(kept + at, p);
    // The same product as with a coefficient of one.
    for (int i = 0; i < N; ++i) factors.step(p.of[i], to_float(g.of[i]) * 1.0f, m.of[i], v.of[i], runs.decays(at + i));
    store(parameters + at, p);
}

#define ADAMW(G, N, suffix)                                                                                                \
    KERNEL(256, 4)                                                                                                         \
    adamw_##suffix(float* parameters, G* gradients, float* first, float* second, bf16* rounded, const double* norm,        \
                   u32 len, float clip, Runs runs, float beta1, float beta2, float decay, float rate, float root,          \
                   float epsilon) {                                                                                        \
        update<G, N>(parameters, gradients, first, second, rounded, norm, len, clip, runs,                                 \
                     Factors{beta1, beta2, decay, rate, root, epsilon});                                                   \
    }                                                                                                                      \
    KERNEL(256, 4)                                                                                                         \
    adamw_ahead_##suffix(float* parameters, float* kept, const G* gradients, const float* first, const float* second,      \
                         u32 len, Runs runs, float beta1, float beta2, float decay, float rate, float root,                \
                         float epsilon) {                                                                                  \
        update_ahead<G, N>(parameters, kept, gradients, first, second, len, runs,                                          \
                           Factors{beta1, beta2, decay, rate, root, epsilon});                                             \
    }

ADAMW(float, 4, f32_wide)
ADAMW(float, 1, f32)
ADAMW(bf16, 4, bf16_wide)
ADAMW(bf16, 1, bf16)

/// partial[block] = the block's part of the sum of squares. The grid does not depend on the machine, so neither does the sum.
template <typename G, int N>
DEVICE void sum_of_squares(const G* x, double* partial, u64 len) {
    double sum = 0.0;
    const u64 stride = u64(gridDim.x) * blockDim.x * N;
    for (u64 i = (u64(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < len; i += stride) {
        const Pack<G, N> values = load<N>(x + i);
        for (int n = 0; n < N; ++n) sum += double(to_float(values.of[n])) * double(to_float(values.of[n]));
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

#define SQUARES(G, N, suffix)                                                                                              \
    KERNEL(256, 4) square_parts_##suffix(const G* x, double* partial, u64 len) { sum_of_squares<G, N>(x, partial, len); }

SQUARES(float, 4, f32_wide)
SQUARES(float, 1, f32)
SQUARES(bf16, 8, bf16_wide)
SQUARES(bf16, 1, bf16)

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
