// Element by element: sums, biases, activations, casts.
//
// Layouts: flat arrays of `len` elements, except where a comment says rows. Each thread takes N neighbours (16 bytes of the
// wider type) or, where addresses or lengths are not multiples of that, one element. Arithmetic is float.
// Source: SwiGLU, Shazeer 2020; GELU in its tanh form, Hendrycks & Gimpel 2016, section 2, written with a sigmoid,
// (1 + tanh(u)) / 2 = sigmoid(2 u), which keeps its relative precision where 1 + tanh cancels.
#include "gpu.cuh"

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

#define ROOT 0.7978845608028654f /* sqrt(2 / pi) */
#define CUBIC 0.044715f

/// First element of this thread.
template <int N>
DEVICE u64 first() { return (u64(blockIdx.x) * blockDim.x + threadIdx.x) * N; }

/// out = f(a, b)
template <typename T, int N, typename F>
DEVICE void binary(const T* a, const T* b, T* out, u64 len, F f) {
    const u64 at = first<N>();
    if (at >= len) return;
    const Pack<T, N> left = load<N>(a + at), right = load<N>(b + at);
    Pack<T, N> result;
    for (int i = 0; i < N; ++i) result.of[i] = from_float<T>(f(to_float(left.of[i]), to_float(right.of[i])));
    store(out + at, result);
}

struct Plus {
    DEVICE float operator()(float a, float b) const { return a + b; }
};

/// d_x from x and d_out: s + x s (1 - s) 2 u' with s = sigmoid(2 u), u' = ROOT (1 + 3 CUBIC x^2).
struct GeluSlope {
    DEVICE float operator()(float x, float d_out) const {
        const float s = sigmoid(2.0f * ROOT * x * (CUBIC * x * x + 1.0f));
        const float slope = 2.0f * ROOT * (3.0f * CUBIC * x * x + 1.0f);
        // Far out, the factor of the infinite slope is zero.
        const float bend = x * (1.0f - s);
        return d_out * s * (bend == 0.0f ? 1.0f : bend * slope + 1.0f);
    }
};

template <typename T, int N>
DEVICE void gelu(const T* x, T* out, u64 len) {
    const u64 at = first<N>();
    if (at >= len) return;
    const Pack<T, N> values = load<N>(x + at);
    Pack<T, N> result;
    for (int i = 0; i < N; ++i) {
        const float v = to_float(values.of[i]);
        result.of[i] = from_float<T>(v * sigmoid(2.0f * ROOT * v * (CUBIC * v * v + 1.0f)));
    }
    store(out + at, result);
}

/// gate_up [rows, 2 cols] (gates, then ups), out [rows, cols]; `len` = rows * cols.
template <typename T, int N>
DEVICE void swiglu(const T* gate_up, T* out, u32 cols, u64 len) {
    const u64 at = first<N>();
    if (at >= len) return;
    const T* row = gate_up + at / cols * 2 * cols + at % cols;
    const Pack<T, N> gates = load<N>(row), ups = load<N>(row + cols);
    Pack<T, N> result;
    for (int i = 0; i < N; ++i) {
        const float gate = to_float(gates.of[i]);
        result.of[i] = from_float<T>(gate * sigmoid(gate) * to_float(ups.of[i]));
    }
    store(out + at, result);
}

/// silu'(g) = s (1 + g (1 - s)) with s = sigmoid(g).
template <typename T, int N>
DEVICE void swiglu_backward(const T* gate_up, const T* d_out, T* d_gate_up, u32 cols, u64 len) {
    const u64 at = first<N>();
    if (at >= len) return;
    const u64 row = at / cols * 2 * cols + at % cols;
    const Pack<T, N> gates = load<N>(gate_up + row), ups = load<N>(gate_up + row + cols), slopes = load<N>(d_out + at);
    Pack<T, N> d_gates, d_ups;
    for (int i = 0; i < N; ++i) {
        const float gate = to_float(gates.of[i]), up = to_float(ups.of[i]), slope = to_float(slopes.of[i]);
        const float s = sigmoid(gate);
        d_gates.of[i] = from_float<T>(slope * up * s * (gate * (1.0f - s) + 1.0f));
        d_ups.of[i] = from_float<T>(slope * gate * s);
    }
    store(d_gate_up + row, d_gates);
    store(d_gate_up + row + cols, d_ups);
}

/// x [rows, cols] += bias [cols]; `len` = rows * cols.
template <typename T, int N>
DEVICE void add_bias(T* x, const T* bias, u32 cols, u64 len) {
    const u64 at = first<N>();
    if (at >= len) return;
    Pack<T, N> values = load<N>(x + at);
    const Pack<T, N> shifts = load<N>(bias + at % cols);
    for (int i = 0; i < N; ++i) values.of[i] = from_float<T>(to_float(values.of[i]) + to_float(shifts.of[i]));
    store(x + at, values);
}

template <typename From, typename To, int N>
DEVICE void cast(const From* from, To* to, u64 len) {
    const u64 at = first<N>();
    if (at >= len) return;
    const Pack<From, N> values = load<N>(from + at);
    Pack<To, N> result;
    for (int i = 0; i < N; ++i) result.of[i] = from_float<To>(to_float(values.of[i]));
    store(to + at, result);
}

#define POINTWISE(T, N, suffix)                                                                                            \
    KERNEL(256, 4) sum_##suffix(const T* a, const T* b, T* out, u64 len) { binary<T, N>(a, b, out, len, Plus()); }         \
    KERNEL(256, 4) gelu_##suffix(const T* x, T* out, u64 len) { gelu<T, N>(x, out, len); }                                 \
    KERNEL(256, 4) gelu_backward_##suffix(const T* x, const T* d_out, T* d_x, u64 len) {                                   \
        binary<T, N>(x, d_out, d_x, len, GeluSlope());                                                                     \
    }                                                                                                                      \
    KERNEL(256, 4) swiglu_##suffix(const T* gate_up, T* out, u32 cols, u64 len) { swiglu<T, N>(gate_up, out, cols, len); } \
    KERNEL(256, 4) swiglu_backward_##suffix(const T* gate_up, const T* d_out, T* d_gate_up, u32 cols, u64 len) {           \
        swiglu_backward<T, N>(gate_up, d_out, d_gate_up, cols, len);                                                       \
    }                                                                                                                      \
    KERNEL(256, 4) add_bias_##suffix(T* x, const T* bias, u32 cols, u64 len) { add_bias<T, N>(x, bias, cols, len); }

POINTWISE(float, 4, f32_wide)
POINTWISE(float, 1, f32)
POINTWISE(bf16, 8, bf16_wide)
POINTWISE(bf16, 1, bf16)

KERNEL(256, 4) cast_to_bf16_wide(const float* from, bf16* to, u64 len) { cast<float, bf16, 4>(from, to, len); }
KERNEL(256, 4) cast_to_bf16(const float* from, bf16* to, u64 len) { cast<float, bf16, 1>(from, to, len); }
KERNEL(256, 4) cast_to_f32_wide(const bf16* from, float* to, u64 len) { cast<bf16, float, 4>(from, to, len); }
KERNEL(256, 4) cast_to_f32(const bf16* from, float* to, u64 len) { cast<bf16, float, 1>(from, to, len); }
