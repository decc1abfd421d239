// SPDX-License-Identifier: Apache-2.0
// What Python hands to the kernels, through a plain C interface: no torch headers, so one build fits every torch.
// `merit_ds/ops/native.py` and `merit_ds/ops/table.py` mirror these structs.
#pragma once
#include <cstdint>

// A rectangle of one logical matrix in one tensor: `rows` runs of `cols` elements, each `pitch` after the last.
// All int64, as the Python side builds the table as one int64 tensor [tiles, 9].
struct Tile {
    int64_t tensor;      // which of Batch::tensors
    int64_t offset;      // of its first element in that tensor
    int64_t pitch;
    int64_t rows;
    int64_t cols;
    int64_t row_slot;    // of its first row's maxima; -1: the matrix has no row and column maxima (a vector, or unscaled)
    int64_t col_slot;    // of its first column's maxima; -1 as above
    int64_t whole_slot;  // of the whole weight's maxima; -1: no trust ratio, s = 1
    int64_t hyper;       // which of Batch::hypers
};

enum DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };

// Flat, contiguous. A null gradient says: leave this tensor alone.
struct TensorSet {
    void* weight;
    const void* grad;
    float* exp_avg;
    float* exp_avg_sq;
    int32_t weight_dtype;
    int32_t grad_dtype;
};

// A step's scalars, each rounded to float32 once. Without clipping `clip` is infinity; of the two eps one is zero.
struct Hyper {
    float beta1;
    float one_minus_beta1;
    float beta2;
    float one_minus_beta2;
    float eps_inside;   // added to v
    float eps_outside;  // added to sqrt(v)
    float weight_decay;
    float lr;
    float clip;
};

// Maxima of |w| and |u| as the bits of non-negative floats: as unsigned integers they have the same order, and NaN
// sorts above infinity, so that no maximum loses one.
struct Maxima {
    uint32_t weight;
    uint32_t update;
};

struct Batch {
    const Tile* tiles;         // on the tensors' device
    const TensorSet* tensors;  // on the host, also for CUDA
    const Hyper* hypers;       // on the tensors' device
    Maxima* maxima;            // on the tensors' device, by slot
    const float* noop;         // on the tensors' device, or null; anything but 0 there: touch nothing
    void* stream;              // CUDA only
    int64_t tile_count;
    int64_t tensor_count;
    int64_t device;            // CUDA only
    int64_t threads;           // CPU only
};

// Each returns null, or a text that says what went wrong. On CUDA they only enqueue.
extern "C" {
// First pass: moments in place, maxima raised.
const char* merit_accumulate(const Batch* batch);
// Second pass, when the maxima are complete: w -= lr * clip(s * u).
const char* merit_apply(const Batch* batch);
// Both, for tiles whose maxima nobody else contributes to. Tiles of one fragment stand together.
const char* merit_step(const Batch* batch);
}
