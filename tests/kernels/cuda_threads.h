// Runs CUDA kernels on the CPU: a std::thread for each thread of a block, the blocks one after the other. -fsanitize=thread then reports
// the races that a missing __syncthreads leaves. As on a GPU, shared memory starts with what the block before left there. Unlike
// on a GPU, votes and shuffles order memory within a warp.
#pragma once

#include <atomic>
#include <barrier>
#include <deque>
#include <thread>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#define __syncthreads() on_threads::sync_block(__COUNTER__ - on_threads::first_site)

namespace on_threads {

struct Index {
    unsigned x;
};
struct Warp {
    std::barrier<> barrier{32};
    unsigned lanes[32];
};
struct Block {
    std::barrier<> barrier;
    std::deque<Warp> warps;
};

inline thread_local Index thread_index, block_index, block_size;
inline thread_local Block* block;
constexpr int first_site = __COUNTER__ + 1;
inline int left_out = -1;  // which __syncthreads of the source does nothing, from 0

inline void sync_block(int site) {
    if (site != left_out) block->barrier.arrive_and_wait();
}

// Every lane's value, for a read that ends before any lane goes on.
template <typename Read>
auto exchange(unsigned value, Read read) {
    Warp& warp = block->warps[thread_index.x / 32];
    warp.lanes[thread_index.x % 32] = value;
    warp.barrier.arrive_and_wait();
    const auto result = read(warp.lanes, thread_index.x % 32);
    warp.barrier.arrive_and_wait();
    return result;
}

// args: where the values of the arguments are, as for cuLaunchKernel.
template <typename... Args>
void launch(void (*kernel)(Args...), int blocks, int threads, void** args) {
    Block shared{std::barrier<>(threads), std::deque<Warp>(threads / 32)};
    auto call = [=]<std::size_t... i>(std::index_sequence<i...>) { kernel(*static_cast<Args*>(args[i])...); };
    std::vector<std::jthread> running;
    for (int thread = 0; thread < threads; ++thread) {
        running.emplace_back([&, thread] {
            thread_index.x = thread, block_size.x = threads, block = &shared;
            for (int i = 0; i < blocks; ++i) {
                block_index.x = i;
                call(std::index_sequence_for<Args...>());
                shared.barrier.arrive_and_wait();
            }
        });
    }
}

}  // namespace on_threads

#define threadIdx on_threads::thread_index
#define blockIdx on_threads::block_index
#define blockDim on_threads::block_size

inline unsigned __ballot_sync(unsigned, bool vote) {
    return on_threads::exchange(vote, [](const unsigned* lanes, int) {
        unsigned votes = 0;
        for (int lane = 0; lane < 32; ++lane) votes |= lanes[lane] << lane;
        return votes;
    });
}

inline int __shfl_up_sync(unsigned, int value, int step) {
    return on_threads::exchange(value, [=](const unsigned* lanes, int lane) { return (int)lanes[lane < step ? lane : lane - step]; });
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }

inline int atomicAdd(int* sum, int value) { return std::atomic_ref(*sum).fetch_add(value, std::memory_order_relaxed); }
