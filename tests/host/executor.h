// Runs CUDA kernels on the CPU: every CUDA thread is a fiber, every primitive has its documented meaning.
//
// Blocks run one after another. Within a block, fibers take turns: one runs until it must wait for others. Shared
// memory is poisoned with NaN, checked for reads of copies still under way and for accesses that no barrier orders,
// and its bank conflicts are counted. Asynchronous copies run *eager* (done when issued) or *lazy* (done when the
// program waits for them, not before). Everything found wrong names the kernel and the source line.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include <ucontext.h>

namespace amskv::host {

using Where = std::source_location;

struct Dim3 {
    int x = 0;
};

inline constexpr int kLanes = 32;
inline constexpr int kMaxWarps = 32;
inline constexpr int kBarriers = 16;
inline constexpr int kAllLanes = -1;  // a read on behalf of the whole warp
inline constexpr int kGranule = 16;   // bytes of shared memory that are tracked as one

// Memory that a kernel may reach by asynchronous copy.
struct Buffer {
    const unsigned char* begin;
    size_t size;
};

struct Options {
    bool lazy = false;
    int shared_bytes = 227 * 1024;  // the most a block may ask for
    std::vector<Buffer> buffers;    // none: not checked
};

struct Counters {
    int64_t blocks = 0, products = 0, copies = 0;
    int64_t bank_conflicts = 0;  // extra turns that ldmatrix, shared loads and stores took
};

struct Copy {
    uint32_t to;
    const void* from;  // null: zeros
    Where where;
};

struct Fiber {
    ucontext_t start{};
    std::jmp_buf resume{};
    std::unique_ptr<unsigned char[]> stack;
    bool started = false, done = false;
    int thread = 0, warp = 0, lane = 0;
    const uint64_t* waits_for = nullptr;  // runs again when this counter differs from `seen`
    uint64_t seen = 0;
    const char* waits_in = "";
    Where waits_at;
    std::vector<Copy> open;                 // copies of the group not yet closed
    std::vector<std::vector<Copy>> groups;  // closed and not yet waited for, oldest first
};

// A clock per warp: what its accesses are known to come after.
using Clock = std::vector<uint32_t>;

struct Warp {
    void* slots[kLanes] = {};
    const char* name = nullptr;
    Where where;
    int arrived = 0;
    uint64_t turn = 0;
    uint64_t barriers = 0;  // warp_barrier and bar.sync so far: what orders the lanes among themselves
    Clock clock;
};

struct Barrier {
    int arrived = 0, expected = 0;
    uint64_t turn = 0;
    std::vector<int> warps;
};

// What is known of 16 bytes of shared memory.
struct Granule {
    int pending = 0;  // copies issued and not yet waited for
    Where pending_at;
    int writer = -1, writer_lane = -1;
    uint32_t written = 0;           // the writer's clock
    uint64_t written_barriers = 0;  // the barriers of its warp so far
    Where written_at;
    uint32_t read[kMaxWarps] = {};  // every warp's clock when it last read
};

class Executor {
public:
    static Executor& get();

    Options options;
    Counters counters;

    void run(const char* kernel, int blocks, int threads, int shared_bytes, const std::function<void()>& body);

    // For the primitives.
    Fiber& fiber() { return *fibers_[current_]; }
    void wait(const uint64_t& counter, const char* name, const Where& where);
    void barrier(int id, int threads, const Where& where);
    void copy_async(uint32_t to, const void* from, bool valid, const Where& where);
    void commit();
    void wait_copies(size_t pending);
    // By a lane of the running fiber's warp.
    const unsigned char* read(uint32_t from, int bytes, int lane, const Where& where);
    void write(uint32_t to, const void* from, int bytes, int lane, const Where& where);
    void warp_barrier() { ++warps_[fiber().warp].barriers; }
    void count_conflicts(const uint32_t* addresses, int threads);
    [[noreturn]] void fail(const std::string& what, const Where& where);

    // Runs `all` on every lane's slot once the whole warp has come here.
    template <typename Slot, typename All>
    void together(const char* name, const Where& where, Slot& mine, All&& all) {
        Warp& warp = warps_[fiber().warp];
        enter(warp, name, where, &mine);
        if (warp.arrived < kLanes) return wait(warp.turn, name, where);
        Slot* slots[kLanes];
        for (int i = 0; i < kLanes; ++i) slots[i] = static_cast<Slot*>(warp.slots[i]);
        all(slots);
        warp.arrived = 0;
        ++warp.turn;
    }

private:
    void enter(Warp& warp, const char* name, const Where& where, void* slot);
    void reset(int block, int threads, int shared_bytes);
    void run_block();
    void switch_to(int next);
    int next_runnable() const;
    void finish();
    void perform(const Copy& copy);
    void check_range(uint32_t address, int bytes, const Where& where);
    void check_ordered(Granule& granule, bool writes, const Where& where);
    void mark_written(Granule& granule, int lane, const Where& where);
    [[noreturn]] void stuck();
    static void enter_fiber();

    std::string kernel_;
    const std::function<void()>* body_ = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Warp> warps_;
    std::vector<Barrier> barriers_;
    std::vector<unsigned char> shared_;
    std::vector<Granule> granules_;
    int threads_ = 0, current_ = 0, left_ = 0, block_ = 0;
    std::jmp_buf scheduler_{};
    std::exception_ptr error_;
};

}  // namespace amskv::host

// The launch coordinates of the fiber that runs.
inline amskv::host::Dim3 threadIdx, blockIdx;
