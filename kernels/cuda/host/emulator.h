// The machine of gpu.cuh on a plain C++ compiler: the kernels' own sources run on a CPU, thread for thread, so that their
// arithmetic, their indices and their use of barriers are tested without a GPU.
//
// A block's threads are fibers of one host thread and take turns where they meet: at a barrier, a shuffle, a tensor-core product. What
// real hardware would leave undefined is a fault here and ends the launch with a message: lanes that meet in different operations,
// lanes that never come, threads that all wait. Shared memory starts as NaN, and asynchronous copies write only when they are waited
// for, so that a missing wait shows. Blocks run one after the other: races between blocks do not show.
//
// Fragment layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" (16-bit floats) and "ldmatrix".
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#include <ucontext.h>

namespace emulated {

struct Index {
    unsigned x = 0, y = 0, z = 0;
};

enum class Meeting : unsigned char { none, shuffle, ballot, matrices, product };

/// What a lane brings to a meeting.
struct Brought {
    alignas(16) unsigned char bytes[32];
};

struct Warp {
    unsigned arrived = 0, generation = 0;
    Meeting meeting = Meeting::none;
    /// By parity of the generation: a lane may be one meeting ahead of a reader, not two.
    Brought brought[2][32];
};

struct Copy {
    void* to;
    const void* from;
    unsigned char inside, closed;
};

struct Fiber {
    jmp_buf point;
    std::unique_ptr<unsigned char[]> stack;
    bool begun = false, done = false;
    /// It waits until this counter differs from `seen`.
    const unsigned* awaited = nullptr;
    unsigned seen = 0;
    Index thread;
    std::vector<Copy> copies;
    unsigned groups = 0;
};

struct Fault {
    char text[256];
};

constexpr std::size_t STACK = 128 * 1024;
/// Stacks begin at different places in the cache.
constexpr std::size_t STAGGER = 320, STAGGERED = 64;

/// The block at work on this host thread.
struct Block {
    Index block, dimensions, grid;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned char> shared;
    unsigned char* shared_start = nullptr;
    unsigned threads = 0, present = 0, alive = 0, arrived = 0, generation = 0;
    bool any[2] = {false, false};
    void (*body)(void**) = nullptr;
    void** arguments = nullptr;
    jmp_buf home;
    bool failed = false;
    Fault fault;
};

inline Block& here() {
    static thread_local Block block;
    return block;
}

inline Fiber& self() { return here().fibers[here().present]; }

[[noreturn]] inline void leave() {
    _longjmp(here().home, 1);
}

[[noreturn]] inline void fail(const char* what) {
    Block& b = here();
    b.failed = true;
    std::snprintf(b.fault.text, sizeof b.fault.text, "thread (%u, %u) of block (%u, %u, %u): %s", self().thread.x, self().thread.y,
                  b.block.x, b.block.y, b.block.z, what);
    leave();
}

inline void run_fiber() {
    here().body(here().arguments);
    Block& b = here();
    b.fibers[b.present].done = true;
    --b.alive;
    // Threads that have left are not waited for at a barrier of the block.
    if (b.alive > 0 && b.arrived == b.alive) {
        b.arrived = 0;
        b.any[(b.generation + 1) % 2] = false;
        ++b.generation;
    }
    _longjmp(b.home, 2);
}

/// Goes on with the next fiber that can run. The caller has saved its own point.
[[noreturn]] inline void resume_next() {
    Block& b = here();
    for (unsigned i = 1; i <= b.threads; ++i) {
        const unsigned n = (b.present + i) % b.threads;
        Fiber& f = b.fibers[n];
        if (f.done || (f.awaited && *f.awaited == f.seen)) continue;
        f.awaited = nullptr;
        b.present = n;
        if (f.begun) _longjmp(f.point, 1);
        f.begun = true;
        ucontext_t entry;
        getcontext(&entry);
        entry.uc_stack.ss_sp = f.stack.get();
        entry.uc_stack.ss_size = STACK - n % STAGGERED * STAGGER;
        entry.uc_link = nullptr;
        makecontext(&entry, run_fiber, 0);
        setcontext(&entry);
    }
    fail("all threads wait: some never come to a barrier or to an operation of their warp");
}

inline void wait_for(const unsigned& counter, unsigned seen) {
    Fiber& f = self();
    f.awaited = &counter;
    f.seen = seen;
    if (_setjmp(f.point) == 0) resume_next();
}

/// Waits until all lanes of the warp are here; returns what each has brought.
inline const Brought* meet(Meeting meeting, const void* brought, std::size_t bytes) {
    Block& b = here();
    const unsigned index = b.present;
    Warp& w = b.warps[index / 32];
    const unsigned generation = w.generation;
    if (w.arrived == 0) w.meeting = meeting;
    if (w.meeting != meeting) fail("the lanes of a warp meet in different operations");
    std::memcpy(w.brought[generation % 2][index % 32].bytes, brought, bytes);
    if (++w.arrived == 32) {
        w.arrived = 0;
        ++w.generation;
    } else {
        wait_for(w.generation, generation);
    }
    return w.brought[generation % 2];
}

/// A barrier of the block; whether any thread brought `true`.
inline bool barrier(bool mine) {
    Block& b = here();
    const unsigned generation = b.generation;
    if (mine) b.any[generation % 2] = true;
    if (++b.arrived == b.alive) {
        b.arrived = 0;
        b.any[(generation + 1) % 2] = false;
        ++b.generation;
    } else {
        wait_for(b.generation, generation);
    }
    return b.any[generation % 2];
}

/// Runs all blocks of a launch. Returns whether it succeeded; otherwise `error` holds why.
inline bool run(void (*body)(void**), const unsigned* grid, const unsigned* block, unsigned shared, void** arguments,
                char* error, std::size_t room) {
    Block& b = here();
    b.grid = {grid[0], grid[1], grid[2]};
    b.dimensions = {block[0], block[1], block[2]};
    b.threads = block[0] * block[1] * block[2];
    b.body = body;
    b.arguments = arguments;
    b.failed = false;
    if (b.threads == 0 || b.threads % 32 != 0 || b.threads > 1024) {
        std::snprintf(error, room, "blocks of %u threads", b.threads);
        return false;
    }
    while (b.fibers.size() < b.threads) {
        b.fibers.emplace_back();
        b.fibers.back().stack.reset(new unsigned char[STACK]);
    }
    b.warps.assign(b.threads / 32, Warp());
    b.shared.resize(shared + 128);
    b.shared_start = b.shared.data() + (128 - reinterpret_cast<std::uintptr_t>(b.shared.data()) % 128) % 128;
    for (b.block.z = 0; b.block.z < grid[2]; ++b.block.z) {
        for (b.block.y = 0; b.block.y < grid[1]; ++b.block.y) {
            for (b.block.x = 0; b.block.x < grid[0]; ++b.block.x) {
                if (shared > 0) std::memset(b.shared_start, 0xff, shared);
                b.alive = b.threads;
                b.arrived = b.generation = 0;
                b.any[0] = b.any[1] = false;
                for (Warp& w : b.warps) w.arrived = w.generation = 0;
                for (unsigned n = 0; n < b.threads; ++n) {
                    Fiber& f = b.fibers[n];
                    f.begun = f.done = false;
                    f.awaited = nullptr;
                    f.copies.clear();
                    f.groups = 0;
                    f.thread = {n % block[0], n / block[0] % block[1], n / (block[0] * block[1])};
                }
                b.present = b.threads - 1;
                // A fiber that ends comes back here, and so does a fault.
                _setjmp(b.home);
                if (b.failed) {
                    std::snprintf(error, room, "%s", b.fault.text);
                    return false;
                }
                if (b.alive > 0) resume_next();
            }
        }
    }
    return true;
}

/// The type of a kernel's arguments, checked against what the caller brings.
template <auto KERNEL>
struct Entry;

template <typename... A, void (*KERNEL)(A...)>
struct Entry<KERNEL> {
    template <std::size_t... I>
    static void call(void** arguments, std::index_sequence<I...>) {
        KERNEL(*static_cast<std::remove_const_t<A>*>(arguments[I])...);
    }
    static void body(void** arguments) { call(arguments, std::index_sequence_for<A...>()); }

    static int launch(const unsigned* grid, const unsigned* block, unsigned shared, void** arguments, const unsigned* sizes,
                      unsigned count, char* error, std::size_t room) {
        const unsigned expected[] = {sizeof(A)...};
        if (count != sizeof...(A)) {
            std::snprintf(error, room, "%u arguments, the kernel has %zu", count, sizeof...(A));
            return 1;
        }
        for (unsigned i = 0; i < count; ++i) {
            if (sizes[i] != expected[i]) {
                std::snprintf(error, room, "argument %u has %u bytes, the kernel's %u", i, sizes[i], expected[i]);
                return 1;
            }
        }
        return run(body, grid, block, shared, arguments, error, room) ? 0 : 1;
    }
};

inline float half_of(unsigned pair, unsigned which) {
    const unsigned bits = (which ? pair >> 16 : pair & 0xffffu) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline unsigned round_half(float x) {
    unsigned bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

} // namespace emulated

#define KERNEL(threads, blocks) extern "C" void
#define DEVICE inline
#define __shared__ static thread_local
#define DYNAMIC_SHARED(name) unsigned char* name = emulated::here().shared_start
#define threadIdx (emulated::self().thread)
#define blockIdx (emulated::here().block)
#define blockDim (emulated::here().dimensions)
#define gridDim (emulated::here().grid)
#define __syncthreads() emulated::barrier(false)

inline unsigned pack(float low, float high) { return emulated::round_half(low) | emulated::round_half(high) << 16; }

inline void mma(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    const unsigned mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    const emulated::Brought* all = emulated::meet(emulated::Meeting::product, mine, sizeof mine);
    const unsigned lane = emulated::here().present % 32, group = lane / 4;
    float sums[4] = {};
    for (unsigned k = 0; k < 16; ++k) {
        const unsigned pair = k % 8 / 2, upper = k / 8;
        unsigned low[6], right[6];
        // Rows group and group + 8 of a lie in the same lane, as registers 0 and 1 (or 2 and 3).
        std::memcpy(low, all[group * 4 + pair].bytes, sizeof low);
        const float top = emulated::half_of(low[2 * upper], k % 2), bottom = emulated::half_of(low[2 * upper + 1], k % 2);
        for (unsigned j = 0; j < 2; ++j) {
            const unsigned column = lane % 4 * 2 + j;
            std::memcpy(right, all[column * 4 + pair].bytes, sizeof right);
            const float b = emulated::half_of(right[4 + upper], k % 2);
            sums[j] += top * b;
            sums[2 + j] += bottom * b;
        }
    }
    for (int i = 0; i < 4; ++i) c[i] += sums[i];
}

namespace emulated {
inline const unsigned short* row_of(const Brought* all, unsigned lane) {
    const unsigned short* row;
    std::memcpy(&row, all[lane].bytes, sizeof row);
    return row;
}
} // namespace emulated

inline void load_matrices(unsigned (&r)[4], const void* row) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) emulated::fail("ldmatrix from an address that is not a multiple of 16");
    const emulated::Brought* all = emulated::meet(emulated::Meeting::matrices, &row, sizeof row);
    const unsigned lane = emulated::here().present % 32;
    for (unsigned m = 0; m < 4; ++m) std::memcpy(&r[m], emulated::row_of(all, m * 8 + lane / 4) + lane % 4 * 2, 4);
}

inline void load_matrices_transposed(unsigned (&r)[4], const void* row) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16 != 0) emulated::fail("ldmatrix from an address that is not a multiple of 16");
    const emulated::Brought* all = emulated::meet(emulated::Meeting::matrices, &row, sizeof row);
    const unsigned lane = emulated::here().present % 32;
    for (unsigned m = 0; m < 4; ++m) {
        const unsigned low = emulated::row_of(all, m * 8 + lane % 4 * 2)[lane / 4];
        const unsigned high = emulated::row_of(all, m * 8 + lane % 4 * 2 + 1)[lane / 4];
        r[m] = low | high << 16;
    }
}

inline void copy_async(void* shared, const void* global, bool inside) {
    if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 || reinterpret_cast<std::uintptr_t>(global) % 16 != 0) {
        emulated::fail("cp.async between addresses that are not multiples of 16");
    }
    emulated::self().copies.push_back({shared, global, static_cast<unsigned char>(inside), 0});
}

inline void copies_commit() {
    emulated::Fiber& f = emulated::self();
    // Copies count the groups that were closed since they were started.
    for (emulated::Copy& copy : f.copies) ++copy.closed;
}

template <int PENDING>
inline void copies_wait() {
    emulated::Fiber& f = emulated::self();
    std::size_t left = 0;
    for (const emulated::Copy& copy : f.copies) {
        if (copy.closed > PENDING) {
            if (copy.inside) {
                std::memcpy(copy.to, copy.from, 16);
            } else {
                std::memset(copy.to, 0, 16);
            }
        } else {
            f.copies[left++] = copy;
        }
    }
    f.copies.resize(left);
}

template <typename T>
inline T shuffle_xor(T x, int lanes) {
    const emulated::Brought* all = emulated::meet(emulated::Meeting::shuffle, &x, sizeof x);
    T other;
    std::memcpy(&other, all[emulated::here().present % 32 ^ static_cast<unsigned>(lanes)].bytes, sizeof other);
    return other;
}

inline float float_of_bits(unsigned bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float power_of_two(float x) {
    const float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0.0f : y;
}

inline bool any_in_block(bool x) { return emulated::barrier(x); }

inline unsigned ballot(bool x) {
    const emulated::Brought* all = emulated::meet(emulated::Meeting::ballot, &x, sizeof x);
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned(all[lane].bytes[0] != 0) << lane;
    return bits;
}

inline int count_bits(unsigned x) { return __builtin_popcount(x); }

inline void sincospif(float x, float* sine, float* cosine) {
    const double angle = double(x) * 3.14159265358979323846;
    *sine = float(std::sin(angle));
    *cosine = float(std::cos(angle));
}
