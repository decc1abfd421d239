// SPDX-License-Identifier: Apache-2.0
// The CPU's side of merit_abi.h: which thread does what, and which instruction set they use.
#include <algorithm>
#include <cfenv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include <omp.h>

#include "merit_cpu_block.h"
#include "merit_cpu_work.h"

namespace merit {
namespace {

// Sizes in elements, found by measurement on two cores with 1 MiB of L2 cache each.
constexpr int64_t BLOCK = 1 << 15;          // between passes a thread turns around block by block, not row by row
constexpr int64_t JOB = 1 << 18;            // what a thread takes at once
constexpr int64_t LARGE = 1 << 17;          // fragments from here on are divided among threads, at a barrier's cost,
constexpr int64_t LARGE_SHARE = 1 << 14;    // if each thread gets as much as this
constexpr int64_t KEPT_BY_THREAD = 1 << 20;  // updates kept between the passes
constexpr int64_t KEPT_BY_ALL = 1 << 23;

// Rounding to nearest, subnormals kept, whatever the calling process has set.
class DefaultRounding {
public:
    DefaultRounding() {
        fegetenv(&saved_);
        fesetenv(FE_DFL_ENV);
    }
    ~DefaultRounding() { fesetenv(&saved_); }
    DefaultRounding(const DefaultRounding&) = delete;

private:
    fenv_t saved_;
};

// One thread's hands.
class Worker {
public:
    Worker(const Work& work, const Kernels& kernels, float* kept, int64_t capacity)
        : work_(work), kernels_(kernels), kept_(kept), capacity_(capacity) {}

    void first_pass(Span span) {
        int64_t done = -span.size();  // up to zero, so that the last updates are the ones that are kept
        for (int64_t tile = work_.tile_at(span.first); done < 0; ++tile) {
            const Tile part = work_.part(tile, span);
            if (part.rows * part.cols <= 0) continue;
            const Blocks blocks(part, STRIP, BLOCK);
            Maxima whole{0, 0};
            for (int64_t i = 0; i < blocks.strips(); ++i) {
                const Tile strip = blocks.strip(i);
                std::fill_n(columns_.weight, strip.cols, 0);
                std::fill_n(columns_.update, strip.cols, 0);
                for (int64_t j = 0; j < blocks.in_strip(); ++j) {
                    Block block = block_of(blocks.block(strip, j), done);
                    block.whole_maxima = whole;
                    kernels_.first_pass(block);
                    whole = block.whole_maxima;
                    done += block.rows * block.cols;
                }
                raise_columns(strip);
            }
            if (part.whole_slot >= 0) raise(work_.batch.maxima[part.whole_slot], whole);
        }
    }

    // In the opposite order: what the first pass left last is in the cache.
    void second_pass(Span span) {
        int64_t left = 0;
        for (int64_t tile = work_.tile_at(span.last - 1); left > -span.size(); --tile) {
            const Tile part = work_.part(tile, span);
            if (part.rows * part.cols <= 0) continue;
            const Blocks blocks(part, STRIP, BLOCK);
            const uint32_t whole = whole_ratio(part);
            for (int64_t i = blocks.strips(); i-- > 0;) {
                const Tile strip = blocks.strip(i);
                set_column_ratios(strip, whole);
                for (int64_t j = blocks.in_strip(); j-- > 0;) {
                    const Tile rectangle = blocks.block(strip, j);
                    left -= rectangle.rows * rectangle.cols;
                    Block block = block_of(rectangle, left);
                    block.whole_ratio = whole;
                    kernels_.second_pass(block);
                }
            }
        }
    }

private:
    // `place`: of its first update, counted back from the span's end.
    Block block_of(const Tile& part, int64_t place) {
        const TensorSet& set = work_.batch.tensors[part.tensor];
        Block block{};
        block.weight = static_cast<char*>(set.weight) + part.offset * (set.weight_dtype == FLOAT32 ? 4 : 2);
        block.grad = static_cast<const char*>(set.grad) + part.offset * (set.grad_dtype == FLOAT32 ? 4 : 2);
        block.exp_avg = set.exp_avg + part.offset;
        block.exp_avg_sq = set.exp_avg_sq + part.offset;
        block.weight_dtype = set.weight_dtype;
        block.grad_dtype = set.grad_dtype;
        block.pitch = part.pitch;
        block.rows = part.rows;
        block.cols = part.cols;
        block.hyper = work_.batch.hypers + part.hyper;
        block.update = -place <= capacity_ ? kept_ + capacity_ + place : nullptr;
        block.row_maxima = part.row_slot >= 0 ? work_.batch.maxima + part.row_slot : nullptr;
        block.columns = &columns_;
        return block;
    }

    static void raise(Maxima& maxima, const Maxima& found) {
        merit::raise(&maxima.weight, found.weight);
        merit::raise(&maxima.update, found.update);
    }

    void raise_columns(const Tile& strip) {
        if (strip.col_slot < 0) return;
        for (int64_t col = 0; col < strip.cols; ++col)
            raise(work_.batch.maxima[strip.col_slot + col], {columns_.weight[col], columns_.update[col]});
    }

    uint32_t whole_ratio(const Tile& part) {
        if (part.whole_slot < 0) return 0x3F800000u;  // 1.0
        kernels_.column_ratios(work_.batch.maxima + part.whole_slot, 1, columns_);
        return columns_.ratio[0];
    }

    void set_column_ratios(const Tile& strip, uint32_t whole) {
        if (strip.col_slot >= 0)
            kernels_.column_ratios(work_.batch.maxima + strip.col_slot, strip.cols, columns_);
        else
            std::fill_n(columns_.ratio, strip.cols, whole);
    }

    const Work& work_;
    const Kernels& kernels_;
    float* const kept_;
    const int64_t capacity_;
    Columns columns_{};
};

struct Capability {
    const Kernels* kernels;
    char error[160];
};

Capability choose() {
    const Kernels* offered[] = {&SCALAR, nullptr, nullptr};
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) offered[1] = &AVX2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        offered[2] = &AVX512;
#endif
    Capability choice{};
    const char* const wanted = getenv("MERIT_CPU_CAPABILITY");
    for (const Kernels* kernels : offered)
        if (kernels && (!wanted || !strcmp(wanted, kernels->name))) choice.kernels = kernels;
    if (!choice.kernels)
        snprintf(choice.error, sizeof choice.error,
                 "MERIT_CPU_CAPABILITY=%.40s is not one that this processor offers: scalar%s%s", wanted,
                 offered[1] ? ", avx2" : "", offered[2] ? ", avx512" : "");
    return choice;
}

const Capability& capability() {
    static const Capability chosen = choose();
    return chosen;
}

const char* fault(const Batch& batch) {
    static thread_local char text[160];
    for (int64_t i = 0; i < batch.tensor_count; ++i) {
        const TensorSet& set = batch.tensors[i];
        if (set.weight_dtype < FLOAT32 || set.weight_dtype > FLOAT16 || set.grad_dtype < FLOAT32 ||
            set.grad_dtype > FLOAT16) {
            snprintf(text, sizeof text, "tensor %lld has an unknown dtype", static_cast<long long>(i));
            return text;
        }
    }
    for (int64_t i = 0; i < batch.tile_count; ++i) {
        const Tile& tile = batch.tiles[i];
        if (tile.tensor < 0 || tile.tensor >= batch.tensor_count || tile.rows < 0 || tile.cols < 0) {
            snprintf(text, sizeof text, "tile %lld lies in no tensor", static_cast<long long>(i));
            return text;
        }
    }
    return nullptr;
}

using Spans = std::vector<Span>;

void append_pieces(Spans& spans, const Work& work, Span span) {
    const int64_t pieces = (span.size() + JOB - 1) / JOB;
    for (int64_t i = 0; i < pieces; ++i) spans.push_back(work.piece(span, i, pieces));
}

int64_t largest(const Spans& spans) {
    int64_t result = 0;
    for (const Span& span : spans) result = std::max(result, span.size());
    return result;
}

// One pass over everything; the second goes backwards.
void one_pass(const Work& work, const Kernels& kernels, int threads, void (Worker::*pass)(Span), bool backwards) {
    Spans jobs;
    append_pieces(jobs, work, work.all());
    if (backwards) std::reverse(jobs.begin(), jobs.end());
#pragma omp parallel num_threads(threads)
    {
        const DefaultRounding rounding;
        Worker worker(work, kernels, nullptr, 0);
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < jobs.size(); ++i) (worker.*pass)(jobs[i]);
    }
}

void accumulate(const Work& work, const Kernels& kernels, int threads) {
    one_pass(work, kernels, threads, &Worker::first_pass, false);
}

void apply(const Work& work, const Kernels& kernels, int threads) {
    one_pass(work, kernels, threads, &Worker::second_pass, true);
}

void step(const Work& work, const Kernels& kernels, int threads) {
    Spans large, jobs;
    work.fragments([&](Span span, bool scaled) {
        if (!scaled)
            append_pieces(jobs, work, span);
        else if (threads > 1 && span.size() >= std::max(LARGE, LARGE_SHARE * threads))
            large.push_back(span);
        else
            jobs.push_back(span);
    });
    const int64_t capacity =
        std::min({std::max(largest(large), largest(jobs)), KEPT_BY_THREAD, KEPT_BY_ALL / threads});
    const std::unique_ptr<float[]> kept(new float[capacity * threads]);
#pragma omp parallel num_threads(threads)
    {
        const DefaultRounding rounding;
        const int thread = omp_get_thread_num(), members = omp_get_num_threads();
        Worker worker(work, kernels, kept.get() + capacity * thread, capacity);
        for (const Span& fragment : large) {
            const Span share = work.piece(fragment, thread, members);
            worker.first_pass(share);
#pragma omp barrier
            worker.second_pass(share);
        }
#pragma omp for schedule(dynamic)
        for (size_t i = 0; i < jobs.size(); ++i) {
            worker.first_pass(jobs[i]);
            worker.second_pass(jobs[i]);
        }
    }
}

const char* run(const Batch* batch, void (*passes)(const Work&, const Kernels&, int)) noexcept {
    if (batch->noop && *batch->noop != 0) return nullptr;
    const Capability& chosen = capability();
    if (!chosen.kernels) return chosen.error;
    if (const char* text = fault(*batch)) return text;
    try {
        passes(Work(*batch), *chosen.kernels, int(std::max<int64_t>(batch->threads, 1)));
    } catch (const std::bad_alloc&) {
        return "out of memory: nothing was changed";
    }
    return nullptr;
}

}  // namespace
}  // namespace merit

extern "C" {

// The vector width in use, or "none" where the environment asks for one that is not there: then each call says so.
const char* merit_capability() {
    const merit::Kernels* const kernels = merit::capability().kernels;
    return kernels ? kernels->name : "none";
}

const char* merit_accumulate(const Batch* batch) { return merit::run(batch, merit::accumulate); }

const char* merit_apply(const Batch* batch) { return merit::run(batch, merit::apply); }

const char* merit_step(const Batch* batch) { return merit::run(batch, merit::step); }
}
