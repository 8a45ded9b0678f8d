// Runs CUDA kernels on the CPU: every CUDA thread is a fiber, every primitive has its documented meaning.
//
// Blocks run one after another. Within a block, fibers take turns: one runs until it must wait for others. Shared
// memory is poisoned with NaN, checked for reads of copies still under way and for accesses that no barrier orders,
// and its bank conflicts are counted. Whatever is asynchronous runs *eager* (done when issued) or *lazy*: cp.async,
// wgmma and bulk stores when the program waits for them, bulk loads when no thread can go on without, the youngest
// first. Everything found wrong names the kernel and the source line.
#pragma once

#include <csetjmp>
#include <cstdint>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include <ucontext.h>

namespace amskv::host {

using Where = std::source_location;

// "room/file.cuh:line": two rooms have a file of the same name.
std::string at(const Where& where);

struct Dim3 {
    int x = 0;
};

inline constexpr int kLanes = 32;
inline constexpr int kMaxWarps = 32;
inline constexpr int kBarriers = 16;
inline constexpr int kAllLanes = -1;  // a read on behalf of the whole warp
inline constexpr int kGranule = 16;   // bytes of shared memory that are tracked as one
inline constexpr int kMbarriers = 64;
inline constexpr int kRegisters = 65536;  // of a multiprocessor

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
    int64_t warpgroup_products = 0, bulk_loads = 0, bulk_stores = 0;
};

// A clock per warp, then one per mbarrier for the loads it counts: what a warp's accesses are known to come after.
using Clock = std::vector<uint32_t>;

void join(Clock& into, const Clock& other);

// A tensor of 16-bit elements as the copy engine sees it; strides in bytes, of dimensions 1 … 3.
struct TensorMap {
    unsigned char* base;
    int64_t dims[4], strides[3];
    int box_rows;
};

// Part of a tensor and its place in shared memory.
struct BulkCopy {
    TensorMap map;
    int64_t start[4];
    uint32_t shared;
    uint32_t barrier;  // of a load
    Where where;
};

// One warp's part of a wgmma: 16 rows of `columns` sums. An operand in shared memory is its descriptor.
struct Product {
    float* d[kLanes];
    const uint32_t* a[kLanes];  // null: in shared memory
    uint64_t a_operand, b_operand;
    int columns;
    bool accumulate, b_across_rows, half;
    Where where;
};

struct Mbarrier {
    int index = 0, expected = 0, pending = 0;
    int64_t bytes = 0;   // expected and not yet come
    uint64_t phase = 0;  // phases that ended
    bool shown = false;  // to the copy engine
    Clock arrived, released;  // what the phase under way, and those that ended, come after
    Where where;
};

struct Copy {
    uint32_t to;
    int bytes;
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
    std::vector<BulkCopy> open_stores, stores;
    std::vector<uint32_t> written;     // shared words written and not yet shown to the asynchronous proxy
    uint32_t waits_on = 0, parity = 0;  // an mbarrier, while it waits on one
};

struct Warp {
    void* slots[kLanes] = {};
    const char* name = nullptr;
    Where where;
    int arrived = 0;
    uint64_t turn = 0;
    uint64_t barriers = 0;  // warp_barrier and bar.sync so far: what orders the lanes among themselves
    Clock clock;
    std::vector<Product> open;
    std::vector<std::vector<Product>> groups;  // of products, committed and not yet waited for, oldest first
    bool fenced = false;                       // wgmma.fence since the last wait
    int registers = 0;                         // of a thread
};

struct Barrier {
    int arrived = 0, expected = 0;
    uint64_t turn = 0;
    std::vector<int> waiting;  // warps, one entry per thread
    Clock clock;               // what those that came come after
};

// What is known of 16 bytes of shared memory.
struct Granule {
    int pending = 0;  // bit i: a copy into word i was issued and is not yet done
    Where pending_at;
    int leaving = 0;    // bulk stores from it, issued and not yet waited for
    int unshown = 0;    // bit i: word i was written and not shown to the asynchronous proxy
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
    void barrier(int id, int threads, bool waits, const Where& where);
    void copy_async(uint32_t to, const void* from, int bytes, bool valid, const Where& where);
    void commit();
    void wait_copies(size_t pending);
    // By a lane of the running fiber's warp.
    const unsigned char* read(uint32_t from, int bytes, int lane, const Where& where);
    void write(uint32_t to, const void* from, int bytes, int lane, const Where& where);
    // The same for wgmma and bulk stores, on the warp's behalf: ordinary writes must have been shown.
    const unsigned char* read_async(uint32_t from, const Where& where);
    void warp_barrier() { ++warps_[fiber().warp].barriers; }
    void show_writes();
    void mbarrier_init(uint32_t at, int arrivals, const Where& where);
    void mbarrier_show();
    void mbarrier_arrive(uint32_t at, int64_t bytes, const Where& where);
    void mbarrier_wait(uint32_t at, uint32_t parity, const Where& where);
    void bulk_load(const BulkCopy& copy);
    void bulk_store(const BulkCopy& copy);
    void bulk_commit();
    void bulk_wait_read();
    // By the last lane of a warp to come.
    void multiply(const Product& product);
    void fence_products() { warps_[fiber().warp].fenced = true; }
    void commit_products();
    void wait_products(size_t pending);
    void set_registers(int count, bool more, const Where& where);
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
    int next_runnable();
    void finish();
    void finish_block();
    Mbarrier& mbarrier(uint32_t at, const Where& where);
    void complete(Mbarrier& barrier);
    void perform(const BulkCopy& load);
    void perform(const Product& product);
    template <typename F>
    void each_row(const BulkCopy& copy, F&& f) const;
    std::string waits(const Fiber& fiber) const;
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
    std::map<uint32_t, Mbarrier> mbarriers_;
    std::vector<BulkCopy> loads_;  // under way
    int registers_free_ = 0;
    uint64_t registers_turn_ = 0;
    int threads_ = 0, current_ = 0, left_ = 0, block_ = 0;
    std::jmp_buf scheduler_{};
    std::exception_ptr error_;
};

}  // namespace amskv::host

// The launch coordinates of the fiber that runs.
inline amskv::host::Dim3 threadIdx, blockIdx;
