// SPDX-License-Identifier: Apache-2.0
// Small kernels, right ones and ones with a planted bug, for the tests of the emulation:  planted NAME SEED
#include <cstdlib>
#include <vector>

namespace {

constexpr unsigned THREADS = 64, BLOCKS = 3;
constexpr uint32_t ALL = 0xFFFFFFFFu;

struct Words {
    uint32_t word[THREADS];
};

// Each block's words in reverse, through shared memory.
template <bool BARRIER>
__global__ void reverse(const uint32_t* from, uint32_t* to) {
    MERIT_SHARED(Words, words);
    const unsigned first = blockIdx.x * blockDim.x;
    words.word[threadIdx.x] = from[first + threadIdx.x];
    if (BARRIER) __syncthreads();
    to[first + threadIdx.x] = words.word[THREADS - 1 - threadIdx.x];
}

// The largest of each warp, by both collective operations, and of all, by an atomic; twice, in case one disturbs another.
__global__ void largest(const uint32_t* from, uint32_t* to) {
    const unsigned first = blockIdx.x * blockDim.x;
    for (int round = 0; round < 2; ++round) {
        uint32_t mine = from[first + threadIdx.x] + uint32_t(round);
        const uint32_t reduced = __reduce_max_sync(ALL, mine);
        for (int distance = 16; distance > 0; distance /= 2)
            mine = std::max(mine, __shfl_xor_sync(ALL, mine, distance));
        to[first + threadIdx.x] = mine == reduced ? mine : 0;
    }
    atomicMax(&to[BLOCKS * THREADS], to[first + threadIdx.x]);
}

// In which order the threads came.
__global__ void order(uint32_t*, uint32_t* to) {
    to[to[BLOCKS * THREADS]++] = blockIdx.x * blockDim.x + threadIdx.x;
}

template <bool ZEROED>
__global__ void sum_in_shared(const uint32_t* from, uint32_t* to) {
    MERIT_SHARED(Words, words);
    if (ZEROED) words.word[threadIdx.x] = 0;
    words.word[threadIdx.x] += from[blockIdx.x * blockDim.x + threadIdx.x];
    to[blockIdx.x * blockDim.x + threadIdx.x] = words.word[threadIdx.x];
}

__global__ void past_shared(const uint32_t* from, uint32_t* to) {
    MERIT_SHARED(Words, words);
    uint32_t* word = words.word;
    word[threadIdx.x + 1] = from[threadIdx.x];
    to[threadIdx.x] = word[threadIdx.x];
}

template <int SHIFT>
__global__ void read_fours(const uint32_t* from, uint32_t* to) {
    const float4 four = *reinterpret_cast<const float4*>(from + 4 * (blockIdx.x * blockDim.x + threadIdx.x) % 192 + SHIFT);
    to[threadIdx.x] = __float_as_uint(four.x);
}

__global__ void divergent_barrier(const uint32_t*, uint32_t*) {
    if (threadIdx.x % 2 == 0) __syncthreads();
}

__global__ void two_barriers(const uint32_t*, uint32_t*) {
    if (threadIdx.x % 2 == 0)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void missing_lane(const uint32_t* from, uint32_t* to) {
    if (threadIdx.x != 37) to[threadIdx.x] = __shfl_xor_sync(ALL, from[threadIdx.x], 1);
}

__global__ void outside_mask(const uint32_t* from, uint32_t* to) {
    if (threadIdx.x % 32 < 16) to[threadIdx.x] = __shfl_xor_sync(0xFFFFu, from[threadIdx.x], 16);
}

__global__ void not_in_mask(const uint32_t* from, uint32_t* to) {
    to[threadIdx.x] = __reduce_max_sync(0xFFFFu, from[threadIdx.x]);
}

struct Memory {
    std::vector<uint32_t> from, to;

    template <class Kernel>
    void launch(Kernel* kernel) {
        const uint32_t* input = from.data();
        uint32_t* output = to.data();
        void* parameters[] = {&input, &output};
        if (cudaLaunchKernel(kernel, dim3(BLOCKS), dim3(THREADS), parameters) != cudaSuccess) exit(2);
    }

    template <class Expected>
    void expect(Expected expected) const {
        for (unsigned i = 0; i < BLOCKS * THREADS; ++i) {
            if (to[i] == expected(i)) continue;
            fprintf(stderr, "wrong result: word %u is %u\n", i, to[i]);
            exit(1);
        }
    }
};

}  // namespace

int main(int, char** arguments) {
    const std::string name = arguments[1];
    cuda_emulation_seed(unsigned(atoi(arguments[2])));
    Memory memory{std::vector<uint32_t>(BLOCKS * THREADS), std::vector<uint32_t>(BLOCKS * THREADS + 1)};
    for (unsigned i = 0; i < BLOCKS * THREADS; ++i) memory.from[i] = i * 37 % 1000;
    const auto reversed = [&](unsigned i) { return memory.from[i / THREADS * THREADS + THREADS - 1 - i % THREADS]; };
    const auto same = [&](unsigned i) { return memory.from[i]; };
    const auto of_warp = [&](unsigned i) {
        const auto first = memory.from.begin() + i / 32 * 32;
        return *std::max_element(first, first + 32) + 1;
    };
    if (name == "right") {
        memory.launch(reverse<true>), memory.expect(reversed);
        memory.launch(sum_in_shared<true>), memory.expect(same);
        memory.launch(largest), memory.expect(of_warp);
        if (memory.to.back() != *std::max_element(memory.from.begin(), memory.from.end()) + 1) return 1;
    }
    if (name == "order") {
        memory.launch(order);
        for (uint32_t word : memory.to) printf("%u ", word);
    }
    if (name == "missing_barrier") memory.launch(reverse<false>), memory.expect(reversed);
    if (name == "uninitialised_shared") memory.launch(sum_in_shared<false>), memory.expect(same);
    if (name == "past_shared") memory.launch(past_shared);
    if (name == "wide_past_end") memory.from.resize(190), memory.from.shrink_to_fit(), memory.launch(read_fours<0>);
    if (name == "misaligned_wide") memory.launch(read_fours<1>);
    if (name == "divergent_barrier") memory.launch(divergent_barrier);
    if (name == "two_barriers") memory.launch(two_barriers);
    if (name == "missing_lane") memory.launch(missing_lane);
    if (name == "outside_mask") memory.launch(outside_mask);
    if (name == "not_in_mask") memory.launch(not_in_mask);
    return 0;
}
