// Rotary position embedding, forward and (with the sine negated) backward, in place on a fused projection.
//
// Layout: qkv [tokens, (heads + 2 kv_heads) * dim]; queries and keys turn, values stay. Pairs are (i, i + dim / 2), as in
// Hugging Face's llama. One thread per token and pair walks over the heads, so that the angle, which needs double precision at
// long sequences, is computed once.
// Source: Su et al. 2021, section 3.4.2.
#include "gpu.cuh"

template <typename T>
DEVICE void rotary(T* qkv, u32 tokens, u32 seq, u32 heads, u32 kv_heads, u32 dim, double log2_theta, float direction) {
    const u32 half = dim / 2;
    const u64 index = u64(blockIdx.x) * blockDim.x + threadIdx.x;
    const u32 token = u32(index / half), pair = u32(index % half);
    if (token >= tokens) return;
    const double turns = double(token % seq) * exp2(-2.0 * pair / dim * log2_theta) * 0.15915494309189535; // / (2 pi)
    // In units of pi: no range reduction, which would need local memory.
    float sine, cosine;
    sincospif(float(2.0 * (turns - floor(turns + 0.5))), &sine, &cosine);
    sine *= direction;
    T* low = qkv + u64(token) * (heads + 2 * kv_heads) * dim + pair;
    for (u32 head = 0; head < heads + kv_heads; ++head, low += dim) {
        const float x = to_float(low[0]), y = to_float(low[half]);
        low[0] = from_float<T>(x * cosine - y * sine);
        low[half] = from_float<T>(y * cosine + x * sine);
    }
}

KERNEL(128, 4)
rotary_f32(float* qkv, u32 tokens, u32 seq, u32 heads, u32 kv_heads, u32 dim, double log2_theta, float direction) {
    rotary<float>(qkv, tokens, seq, heads, kv_heads, dim, log2_theta, direction);
}
KERNEL(128, 4)
rotary_bf16(bf16* qkv, u32 tokens, u32 seq, u32 heads, u32 kv_heads, u32 dim, double log2_theta, float direction) {
    rotary<bf16>(qkv, tokens, seq, heads, kv_heads, dim, log2_theta, direction);
}
