// What the kernels use of the machine: element types, warp shuffles, tensor-core products, asynchronous copies.
//
// Needs no CUDA header, so that a machine with a driver and NVRTC alone can compile it. `host/emulator.h` provides the same
// names on a plain C++ compiler, fragment layouts included; everything in the other files is common to both.
//
// Source of the instructions and of their fragment layouts: PTX ISA, sections "Warp Level Matrix Multiply-Accumulate" (mma.m16n8k16,
// ldmatrix) and "Data Movement and Conversion" (cp.async, cvt.rn.bf16x2). All of them exist from sm_80 on.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

/// bfloat16 as bits: the upper half of a float.
struct alignas(2) bf16 {
    unsigned short bits;
};

#ifndef PACELINE_EMULATED

#define KERNEL(threads, blocks) extern "C" __global__ void __launch_bounds__(threads, blocks)
#define DEVICE __device__ __forceinline__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

/// Two floats as a pair of bfloat16, `low` in the lower half; rounds to nearest even.
DEVICE u32 pack(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

/// `c += a * b` for tiles a[16,16], b[16,8], c[16,8].
DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

/// Four 8x8 matrices of bf16 from shared memory; lane `i` gives the address of row `i % 8` of matrix `i / 8`.
DEVICE void load_matrices(u32 (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// As `load_matrices`, each matrix transposed.
DEVICE void load_matrices_transposed(u32 (&r)[4], const bf16* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// Starts a copy of 16 bytes from global to shared memory; zeroes instead when `inside` is false.
DEVICE void copy_async(void* shared, const void* global, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(inside ? 16 : 0)
                 : "memory");
}

/// Closes a group of copies.
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `PENDING` groups of this thread are under way.
template <int PENDING>
DEVICE void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

DEVICE float shuffle_xor(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
DEVICE double shuffle_xor(double x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }
DEVICE float float_of_bits(u32 bits) { return __uint_as_float(bits); }

/// 2^x in one instruction: `exp2f` adds three for results below the smallest normal number, which here become zero.
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE bool any_in_block(bool x) { return __syncthreads_or(x); }
DEVICE u32 ballot(bool x) { return __ballot_sync(0xffffffffu, x); }
DEVICE int count_bits(u32 x) { return __popc(x); }

#else
#include "host/emulator.h"
#endif

DEVICE float infinity() { return float_of_bits(0x7f800000u); }
DEVICE float not_a_number() { return float_of_bits(0x7fffffffu); }

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return float_of_bits(static_cast<u32>(x.bits) << 16); }

template <typename T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) { return x; }
template <>
DEVICE bf16 from_float<bf16>(float x) { return bf16{static_cast<unsigned short>(pack(x, 0.0f))}; }

/// `N` neighbouring elements, moved in one access where they fill 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
    T of[N];
};

template <int N, typename T>
DEVICE Pack<T, N> load(const T* from) { return *reinterpret_cast<const Pack<T, N>*>(from); }
template <int N, typename T>
DEVICE void store(T* to, const Pack<T, N>& pack) { *reinterpret_cast<Pack<T, N>*>(to) = pack; }

DEVICE u32 lane() { return threadIdx.x % 32; }
DEVICE u32 warp() { return threadIdx.x / 32; }

/// The sum over the lanes of a warp, the same in every lane: added in one order, whatever the lane.
template <typename T>
DEVICE T warp_sum(T x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += shuffle_xor(x, lanes);
    return x;
}

DEVICE float warp_max(float x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, shuffle_xor(x, lanes));
    return x;
}

/// The sum over a block of at most 1024 threads in one dimension, in every thread. May be called again at once.
template <typename T>
DEVICE T block_sum(T x) {
    __shared__ T parts[32];
    x = warp_sum(x);
    __syncthreads();
    if (lane() == 0) parts[warp()] = x;
    __syncthreads();
    T sum = T(0);
    for (u32 i = 0; i < blockDim.x / 32; ++i) sum += parts[i];
    return sum;
}

DEVICE float block_max(float x) {
    __shared__ float parts[32];
    x = warp_max(x);
    __syncthreads();
    if (lane() == 0) parts[warp()] = x;
    __syncthreads();
    float largest = -infinity();
    for (u32 i = 0; i < blockDim.x / 32; ++i) largest = fmaxf(largest, parts[i]);
    return largest;
}
