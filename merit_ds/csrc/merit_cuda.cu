// SPDX-License-Identifier: Apache-2.0
// MERIT on CUDA: one launch a pass over all tiles of all tensors, whatever their sizes, dtypes and scalars.
//
// The tile table lies on the device and is built once for a layout; the tensors' addresses travel by value in the
// kernel's parameters. What a tile may be: `rows` <= merit_tile_rows() and offset % 4 + `cols` <= merit_tile_span();
// or one row without row and column slots of up to merit_tile_rows() * merit_tile_span() elements, offset % 4 included.
//
// Both passes need 40 bytes of memory traffic a parameter: the second computes u again instead of loading it, and walks
// the tiles backwards, since the last ones of the first pass are still in cache.
#include <algorithm>
#include <climits>
#include <cstdio>
#include <initializer_list>

#include "merit_cuda_maxima.h"

#ifndef MERIT_SHARED  // the emulation in the tests brings its own
#define MERIT_SHARED(type, name) __shared__ type name
#endif

namespace merit {
namespace {

constexpr int BLOCKS_PER_MULTIPROCESSOR = 4;  // at least: enough loads in flight to keep the memory busy

// A kernel's only parameter, for up to `CAPACITY` tensors from number `first` on.
template <int CAPACITY>
struct Arguments {
    const Tile* tiles;
    const Hyper* hypers;
    uint32_t* maxima;
    const float* noop;
    int64_t first;
    int64_t count;
    TensorSet tensors[CAPACITY];
};

constexpr int capacity(int bytes) { return (bytes - int(sizeof(Arguments<1>))) / int(sizeof(TensorSet)) + 1; }
constexpr int FEW_TENSORS = capacity(4096);
#if CUDART_VERSION >= 12010
constexpr int MANY_TENSORS = capacity(32764);
#else
constexpr int MANY_TENSORS = FEW_TENSORS;
#endif
static_assert(sizeof(Arguments<FEW_TENSORS>) <= 4096 && sizeof(Arguments<MANY_TENSORS>) <= 32764, "parameters");

// Whether there is anything to do for a tile: not where the step is called off, where the tensor is another launch's, or
// where it has no gradient.
template <int CAPACITY>
MERIT_DEVICE bool due(const Arguments<CAPACITY>& arguments, const Tile& tile) {
    if (arguments.noop != nullptr && *arguments.noop != 0.0f) return false;
    const int64_t index = tile.tensor - arguments.first;
    return index >= 0 && index < arguments.count && arguments.tensors[index].grad != nullptr;
}

// First pass over a tile of weights stored as W and gradients stored as G.
template <bool FOURS, class W, class G>
MERIT_DEVICE void accumulate(const Tile& tile, const TensorSet& tensor, const Hyper& hyper, uint32_t* maxima,
                             Scratch& scratch) {
    Stream<const W> w(static_cast<const W*>(tensor.weight));
    Stream<const G> g(static_cast<const G*>(tensor.grad));
    Stream<float> m(tensor.exp_avg), v(tensor.exp_avg_sq);
    const Place<FOURS> place(tile);
    const Scalars<Number> h(hyper);
    uint32_t* row_maxima = tile.row_slot >= 0 ? maxima + PAIR * tile.row_slot : nullptr;
    Found cols[LANE_WIDTH];
    for (int row = warp(); row < place.rows; row += WARPS) {
        const Run<FOURS> run = place.run(lane(), row);
        run.read(w, g, m, v);
        Found in_row;
#pragma unroll
        for (int i = 0; i < LANE_WIDTH; ++i) {
            const Number weight = decoded(w.four.element[i], tensor.weight_dtype);
            Number exp_avg(m.four.element[i]), exp_avg_sq(v.four.element[i]);
            moments(exp_avg, exp_avg_sq, decoded(g.four.element[i], tensor.grad_dtype), h);
            m.four.element[i] = exp_avg.value;
            v.four.element[i] = exp_avg_sq.value;
            const Bits mask(run.holds(i) ? CLEAR_SIGN : 0u);
            const Found found{bits(weight) & mask, bits(update(weight, exp_avg, exp_avg_sq, h)) & mask};
            cols[i].raise(found);
            in_row.raise(found);
        }
        run.write(m, v);
        if (row_maxima) {
            in_row = warp_maximum(in_row);
            if (lane() < PAIR) atomicMax(&row_maxima[PAIR * row + lane()], in_row.word(lane()));
        }
    }
    if (tile.whole_slot >= 0) combine(scratch, cols, place, tile, maxima);
}

// Second pass over a tile of weights stored as W.
template <bool FOURS, class W>
MERIT_DEVICE void apply(const Tile& tile, const TensorSet& tensor, const Hyper& hyper, const uint32_t* maxima) {
    Stream<W> w(static_cast<W*>(tensor.weight));
    Stream<const float> m(tensor.exp_avg), v(tensor.exp_avg_sq);
    const Place<FOURS> place(tile);
    const Scalars<Number> h(hyper);
    const int64_t row_slot = tile.row_slot;
    const Bits whole = tile.whole_slot >= 0 ? ratio_at(maxima, tile.whole_slot) : Bits(ONE);
    Bits cols[LANE_WIDTH];
#pragma unroll
    for (int i = 0; i < LANE_WIDTH; ++i) {
        const bool own = tile.col_slot >= 0 && place.run(lane(), 0).holds(i);
        cols[i] = own ? ratio_at(maxima, tile.col_slot + place.column(lane(), i)) : whole;
    }
    for (int row = warp(); row < place.rows; row += WARPS) {
        const Run<FOURS> run = place.run(lane(), row);
        run.read(w, m, v);
        const Bits in_row = row_slot >= 0 ? ratio_at(maxima, row_slot + row) : whole;
#pragma unroll
        for (int i = 0; i < LANE_WIDTH; ++i) {
            const Number weight = decoded(w.four.element[i], tensor.weight_dtype);
            const Number u = update(weight, Number(m.four.element[i]), Number(v.four.element[i]), h);
            const Number s = trust<Number>(in_row, cols[i], whole);
            w.four.element[i] = encoded<W>(stepped(weight, u, s, h), tensor.weight_dtype);
        }
        run.write(w);
    }
}

template <class W, class G>
MERIT_DEVICE void accumulate(const Tile& tile, const TensorSet& tensor, const Hyper& hyper, uint32_t* maxima,
                             Scratch& scratch) {
    if (rows_aligned(tile) && aligned<W>(tensor.weight) && aligned<G>(tensor.grad) && aligned<float>(tensor.exp_avg) &&
        aligned<float>(tensor.exp_avg_sq))
        accumulate<true, W, G>(tile, tensor, hyper, maxima, scratch);
    else
        accumulate<false, W, G>(tile, tensor, hyper, maxima, scratch);
}

template <class W>
MERIT_DEVICE void apply(const Tile& tile, const TensorSet& tensor, const Hyper& hyper, const uint32_t* maxima) {
    if (rows_aligned(tile) && aligned<W>(tensor.weight) && aligned<float>(tensor.exp_avg) &&
        aligned<float>(tensor.exp_avg_sq))
        apply<true, W>(tile, tensor, hyper, maxima);
    else
        apply<false, W>(tile, tensor, hyper, maxima);
}

template <int CAPACITY>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
    accumulate_tiles(const Arguments<CAPACITY> __grid_constant__ arguments) {
    MERIT_SHARED(Scratch, scratch);
    const Tile& tile = arguments.tiles[blockIdx.x];
    if (!due(arguments, tile)) return;
    const TensorSet tensor = arguments.tensors[tile.tensor - arguments.first];
    const Hyper& hyper = arguments.hypers[tile.hyper];
    const bool narrow_weight = tensor.weight_dtype != FLOAT32, narrow_grad = tensor.grad_dtype != FLOAT32;
    if (narrow_weight && narrow_grad) accumulate<uint16_t, uint16_t>(tile, tensor, hyper, arguments.maxima, scratch);
    else if (narrow_weight) accumulate<uint16_t, float>(tile, tensor, hyper, arguments.maxima, scratch);
    else if (narrow_grad) accumulate<float, uint16_t>(tile, tensor, hyper, arguments.maxima, scratch);
    else accumulate<float, float>(tile, tensor, hyper, arguments.maxima, scratch);
}

template <int CAPACITY>
__global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
    apply_tiles(const Arguments<CAPACITY> __grid_constant__ arguments) {
    const Tile& tile = arguments.tiles[gridDim.x - 1 - blockIdx.x];
    if (!due(arguments, tile)) return;
    const TensorSet tensor = arguments.tensors[tile.tensor - arguments.first];
    const Hyper& hyper = arguments.hypers[tile.hyper];
    if (tensor.weight_dtype != FLOAT32) apply<uint16_t>(tile, tensor, hyper, arguments.maxima);
    else apply<float>(tile, tensor, hyper, arguments.maxima);
}

// Null, or what failed; the text stays until the thread's next failure.
const char* failure(const char* call, const char* reason) {
    static thread_local char text[256];
    snprintf(text, sizeof text, "%s: %s", call, reason);
    return text;
}

const char* checked(cudaError_t error, const char* call) {
    if (error == cudaSuccess) return nullptr;
    cudaGetLastError();  // forgotten, so that the process's next check does not report it as its own
    return failure(call, cudaGetErrorString(error));
}

enum class Pass { ACCUMULATE, APPLY };

// One launch a pass, or one for each `CAPACITY` tensors where there are more; each leaves the others' tiles alone.
template <int CAPACITY>
const char* launch(const Batch& batch, Pass pass) {
    Arguments<CAPACITY> arguments{batch.tiles, batch.hypers, reinterpret_cast<uint32_t*>(batch.maxima), batch.noop, 0, 0, {}};
    auto* kernel = pass == Pass::ACCUMULATE ? accumulate_tiles<CAPACITY> : apply_tiles<CAPACITY>;
    for (; arguments.first < batch.tensor_count; arguments.first += CAPACITY) {
        arguments.count = std::min<int64_t>(CAPACITY, batch.tensor_count - arguments.first);
        std::copy_n(batch.tensors + arguments.first, arguments.count, arguments.tensors);
        void* parameters[] = {&arguments};
        const dim3 grid(unsigned(batch.tile_count), 1, 1), block(THREADS, 1, 1);
        const char* failed = checked(
            cudaLaunchKernel(kernel, grid, block, parameters, 0, static_cast<cudaStream_t>(batch.stream)),
            "cudaLaunchKernel");
        if (failed) return failed;
    }
    return nullptr;
}

const char* launch(const Batch& batch, Pass pass) {
    return batch.tensor_count <= FEW_TENSORS ? launch<FEW_TENSORS>(batch, pass) : launch<MANY_TENSORS>(batch, pass);
}

const char* run(const Batch& batch, std::initializer_list<Pass> passes) {
    if (batch.tile_count == 0) return nullptr;
    if (batch.tile_count > INT_MAX) return failure("tile_count", "more tiles than a grid can have");
    int before;
    if (const char* failed = checked(cudaGetDevice(&before), "cudaGetDevice")) return failed;
    if (const char* failed = checked(cudaSetDevice(int(batch.device)), "cudaSetDevice")) return failed;
    const char* failed = nullptr;
    for (Pass pass : passes)
        if (!failed) failed = launch(batch, pass);
    const char* not_restored = checked(cudaSetDevice(before), "cudaSetDevice");
    return failed ? failed : not_restored;
}

}  // namespace
}  // namespace merit

extern "C" {
const char* merit_accumulate(const Batch* batch) { return merit::run(*batch, {merit::Pass::ACCUMULATE}); }
const char* merit_apply(const Batch* batch) { return merit::run(*batch, {merit::Pass::APPLY}); }
const char* merit_step(const Batch* batch) {
    return merit::run(*batch, {merit::Pass::ACCUMULATE, merit::Pass::APPLY});
}
int64_t merit_tile_rows() { return merit::TILE_ROWS; }
int64_t merit_tile_span() { return merit::TILE_SPAN; }
}
