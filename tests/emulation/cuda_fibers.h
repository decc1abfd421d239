// SPDX-License-Identifier: Apache-2.0
// The threads of one CUDA block as fibers of one CPU thread, in random order: a fiber runs until it must wait for
// others. What can never be waited for to its end aborts with a message.
#pragma once
#include <pthread.h>
#include <ucontext.h>

#include <array>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 64 * 1024;
using WarpValues = std::array<uint32_t, WARP>;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    fprintf(stderr, "emulation: block %u: ", blockIdx.x);
    vfprintf(stderr, format, values);
    fputc('\n', stderr);
    abort();
}

// A place to run code: a fiber, or the CPU thread itself.
struct Context {
    ucontext_t registers;
    void* bottom = nullptr;
    size_t size = 0;
    void* fake_stack = nullptr;  // AddressSanitizer's

    void switch_to(Context& other) {
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_start_switch_fiber(&fake_stack, other.bottom, other.size);
#endif
        swapcontext(&registers, &other.registers);
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    }
};

struct Fiber : Context {
    std::unique_ptr<char[]> stack{new char[STACK_BYTES]};
    bool ended = false;
    WarpValues values;  // of its warp, from the last collective operation
};

// Who has come to a barrier or a collective operation, and from which line.
struct Meeting {
    std::vector<unsigned> arrived;
    int line = 0;
    uint32_t mask = 0;
    WarpValues values;
};

class Block {
  public:
    static Block& running() {
        static Block block;
        return block;
    }

    std::mt19937 random;

    void run(unsigned threads, const std::function<void()>& kernel) {
        prepare(threads);
        body_ = &kernel;
        for (unsigned thread = 0; thread < threads; ++thread) {
            fibers_[thread]->ended = false;
            ready_.push_back(thread);
        }
        continue_from(caller_);
        shared_.clear();
    }

    void barrier(int line) {
        if (barrier_.arrived.empty()) barrier_.line = line;
        if (barrier_.line != line) fail("threads wait at different barriers: lines %d and %d", barrier_.line, line);
        if (barrier_.arrived.size() + 1 == fibers_.size()) return release(barrier_);
        wait_in(barrier_);
    }

    // The values that a warp's threads named in `mask` brought; each must name the same threads, itself among them.
    const WarpValues& exchange(uint32_t mask, uint32_t value, int line) {
        Meeting& meeting = warps_[current_ / WARP];
        const unsigned lane = current_ % WARP;
        if (!(mask >> lane & 1)) fail("line %d: lane %u is not in its own mask %08x", line, lane, mask);
        if (meeting.arrived.empty()) meeting.line = line, meeting.mask = mask;
        if (meeting.line != line || meeting.mask != mask)
            fail("a warp's threads wait at lines %d and %d, masks %08x and %08x", meeting.line, line, meeting.mask, mask);
        meeting.values[lane] = value;
        if (meeting.arrived.size() + 1 < size_t(__builtin_popcount(mask))) {
            wait_in(meeting);
        } else {
            fibers_[current_]->values = meeting.values;
            for (unsigned thread : meeting.arrived) fibers_[thread]->values = meeting.values;
            release(meeting);
        }
        return fibers_[current_]->values;
    }

    // A __shared__ variable: a heap object of its own, so that AddressSanitizer sees its ends, full of 0xFF.
    void* shared(int variable, size_t bytes) {
        auto& memory = shared_[variable];
        if (!memory) {
            memory.reset(static_cast<char*>(std::aligned_alloc(16, (bytes + 15) / 16 * 16)));
            memset(memory.get(), 0xFF, bytes);
        }
        return memory.get();
    }

    unsigned lane() const { return current_ % WARP; }

  private:
    struct Free {
        void operator()(char* memory) const { std::free(memory); }
    };

    Context caller_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<unsigned> ready_;
    std::vector<Meeting> warps_;
    Meeting barrier_;
    std::map<int, std::unique_ptr<char, Free>> shared_;
    const std::function<void()>* body_ = nullptr;
    unsigned current_ = 0;

    // Fibers serve block after block: each launch of the same size finds them waiting for the next kernel.
    void prepare(unsigned threads) {
        if (fibers_.size() == threads) return;
        find_own_stack();
        fibers_.clear();
        warps_.assign((threads + WARP - 1) / WARP, {});
        for (unsigned thread = 0; thread < threads; ++thread) {
            fibers_.push_back(std::make_unique<Fiber>());
            Fiber& fiber = *fibers_.back();
            fiber.bottom = fiber.stack.get();
            fiber.size = STACK_BYTES;
            getcontext(&fiber.registers);
            fiber.registers.uc_stack.ss_sp = fiber.bottom;
            fiber.registers.uc_stack.ss_size = fiber.size;
            fiber.registers.uc_link = nullptr;
            makecontext(&fiber.registers, fiber_main, 0);
            fiber.registers.uc_stack.ss_size = 0;  // else AddressSanitizer forgets the stack's variables at each switch
        }
    }

    void find_own_stack() {
        pthread_attr_t attributes;
        pthread_getattr_np(pthread_self(), &attributes);
        pthread_attr_getstack(&attributes, &caller_.bottom, &caller_.size);
        pthread_attr_destroy(&attributes);
    }

    static void fiber_main() {
#ifdef __SANITIZE_ADDRESS__
        __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
        Block& block = running();
        for (;;) {
            (*block.body_)();
            Fiber& fiber = *block.fibers_[block.current_];
            fiber.ended = true;
            block.continue_from(fiber);
        }
    }

    void wait_in(Meeting& meeting) {
        meeting.arrived.push_back(current_);
        continue_from(*fibers_[current_]);
    }

    void release(Meeting& meeting) {
        ready_.insert(ready_.end(), meeting.arrived.begin(), meeting.arrived.end());
        meeting.arrived.clear();
    }

    // Runs another fiber that can go on; the caller of `run` when all have ended.
    void continue_from(Context& context) {
        if (ready_.empty()) {
            refuse_waiting();
            return context.switch_to(caller_);
        }
        std::swap(ready_[random() % ready_.size()], ready_.back());
        current_ = ready_.back();
        ready_.pop_back();
        threadIdx = dim3(current_, 0, 0);
        Fiber& next = *fibers_[current_];
        if (&next != &context) context.switch_to(next);
    }

    void refuse_waiting() const {
        unsigned ended = 0;
        for (const auto& fiber : fibers_) ended += fiber->ended;
        if (!barrier_.arrived.empty())
            fail("%zu of %zu threads wait for the others at the barrier in line %d, %u have ended",
                 barrier_.arrived.size(), fibers_.size(), barrier_.line, ended);
        for (const Meeting& meeting : warps_)
            if (!meeting.arrived.empty())
                fail("%zu lanes of a warp wait in line %d for others of the mask %08x", meeting.arrived.size(),
                     meeting.line, meeting.mask);
    }
};

}  // namespace emulation
