// SPDX-License-Identifier: Apache-2.0
// As much of CUDA as the kernels use, on a CPU: `g++ -x c++ -include cuda_emulation.h kernel.cu` compiles the very code
// that nvcc compiles, so that AddressSanitizer and UndefinedBehaviorSanitizer see each of its accesses.
//
// Blocks run one after another and threads one at a time, both in random order. It sees wrong results, accesses that are
// out of bounds or misaligned, uninitialised shared memory (full of 0xFF), and threads that do not meet where they
// must. It cannot see the order in which a GPU's memory shows writes, nor races between single instructions.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>

#include "cuda_fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__ &  // one object for all threads, as on a device
#define MERIT_SHARED(type, name) \
    type& name = *static_cast<type*>(emulation::Block::running().shared(__COUNTER__, sizeof(type)))

#define CUDART_VERSION 12010

struct alignas(16) float4 {
    float x, y, z, w;
};

// The line tells one call from another: threads that meet at different ones have gone different ways.
inline void __syncthreads(int line = __builtin_LINE()) { emulation::Block::running().barrier(line); }

inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value, int line = __builtin_LINE()) {
    const emulation::WarpValues& values = emulation::Block::running().exchange(mask, value, line);
    uint32_t largest = 0;
    for (unsigned lane = 0; lane < emulation::WARP; ++lane)
        if (mask >> lane & 1) largest = std::max(largest, values[lane]);
    return largest;
}

inline uint32_t __shfl_xor_sync(uint32_t mask, uint32_t value, int distance, int line = __builtin_LINE()) {
    const unsigned source = emulation::Block::running().lane() ^ unsigned(distance);
    if (source >= emulation::WARP || !(mask >> source & 1))
        emulation::fail("line %d: a shuffle reads lane %u, which is not in its mask %08x", line, source, mask);
    return emulation::Block::running().exchange(mask, value, line)[source];
}

inline uint32_t atomicMax(uint32_t* address, uint32_t value) {
    return std::exchange(*address, std::max(*address, value));
}

inline uint32_t __float_as_uint(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration, cudaErrorInvalidDevice };
using cudaStream_t = struct CUstream_st*;

// What tests set and look at.
extern "C" {
int64_t cuda_emulation_device = 0;  // the current one of two
int64_t cuda_emulation_launches = 0;
int64_t cuda_emulation_launch_device = -1;
int64_t cuda_emulation_launch_stream = 0;
void cuda_emulation_seed(unsigned seed) { emulation::Block::running().random.seed(seed); }
}

inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess              ? "no error"
           : error == cudaErrorInvalidDevice ? "invalid device ordinal"
                                             : "invalid configuration argument";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = int(cuda_emulation_device);
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device > 1) return cudaErrorInvalidDevice;
    cuda_emulation_device = device;
    return cudaSuccess;
}

namespace emulation {

template <class... P, size_t... I>
void call(void (*kernel)(P...), void** parameters, std::index_sequence<I...>) {
    kernel(*static_cast<std::remove_reference_t<P>*>(parameters[I])...);
}

}  // namespace emulation

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** parameters, size_t dynamic_shared = 0,
                             cudaStream_t stream = nullptr) {
    const bool flat = grid.y == 1 && grid.z == 1 && block.y == 1 && block.z == 1;
    if (!flat || grid.x == 0 || block.x == 0 || block.x > 1024 || dynamic_shared > 0) return cudaErrorInvalidConfiguration;
    ++cuda_emulation_launches;
    cuda_emulation_launch_device = cuda_emulation_device;
    cuda_emulation_launch_stream = reinterpret_cast<int64_t>(stream);
    gridDim = grid;
    blockDim = block;
    std::vector<unsigned> order(grid.x);
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), emulation::Block::running().random);
    const std::function<void()> body = [&] { emulation::call(kernel, parameters, std::index_sequence_for<P...>()); };
    for (unsigned number : order) {
        blockIdx = dim3(number, 0, 0);
        emulation::Block::running().run(block.x, body);
    }
    return cudaSuccess;
}
