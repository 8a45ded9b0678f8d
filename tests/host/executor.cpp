#include "executor.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace amskv::host {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned char kPoison = 0xff;  // bytes of a NaN in fp16, bf16 and fp32
constexpr int kBanks = 32, kBankBytes = 4;

// Bit i: whether these bytes hold word i of their granule.
int words_of(uint32_t address, int bytes) { return ((1 << bytes / kBankBytes) - 1) << address % kGranule / kBankBytes; }

}  // namespace

std::string at(const Where& where) {
    const std::string file = where.file_name();
    const size_t name = file.rfind('/');
    const size_t room = name == std::string::npos || name == 0 ? name : file.rfind('/', name - 1);
    return file.substr(room + 1) + ":" + std::to_string(where.line());
}

void join(Clock& into, const Clock& other) {
    for (size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], other[i]);
}

Executor& Executor::get() {
    static Executor executor;
    return executor;
}

void Executor::run(const char* kernel, int blocks, int threads, int shared_bytes, const std::function<void()>& body) {
    kernel_ = kernel;
    body_ = &body;
    if (threads % kLanes != 0 || threads > kMaxWarps * kLanes || blocks < 1) {
        throw std::runtime_error(
            kernel_ + ": cannot launch " + std::to_string(blocks) + " × " + std::to_string(threads));
    }
    if (shared_bytes > options.shared_bytes) {
        throw std::runtime_error(kernel_ + ": asks for " + std::to_string(shared_bytes) + " bytes of shared memory");
    }
    for (int block = 0; block < blocks; ++block) {
        reset(block, threads, shared_bytes);
        run_block();
        ++counters.blocks;
    }
}

void Executor::reset(int block, int threads, int shared_bytes) {
    threads_ = left_ = threads;
    block_ = block;
    error_ = nullptr;
    const int warps = threads / kLanes, registers = std::min(kRegisters / threads / 8 * 8, 255);
    registers_free_ = kRegisters - registers * threads;
    mbarriers_.clear();
    loads_.clear();
    shared_.assign(shared_bytes, kPoison);
    granules_.assign((shared_bytes + kGranule - 1) / kGranule, Granule{});
    barriers_.assign(kBarriers, Barrier{});
    warps_.assign(warps, Warp{});
    for (int w = 0; w < warps; ++w) {
        warps_[w].clock.assign(warps + kMbarriers, 0);
        warps_[w].clock[w] = 1;
        warps_[w].registers = registers;
    }
    while (static_cast<int>(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
    for (int i = 0; i < threads; ++i) {
        Fiber& f = *fibers_[i];
        if (!f.stack) f.stack.reset(new unsigned char[kStackBytes]);
        f.started = f.done = false;
        f.thread = i;
        f.warp = i / kLanes;
        f.lane = i % kLanes;
        f.waits_for = nullptr;
        f.open.clear();
        f.groups.clear();
        f.open_stores.clear();
        f.stores.clear();
        f.written.clear();
        f.waits_on = 0;
    }
}

void Executor::run_block() {
    blockIdx.x = block_;
    if (_setjmp(scheduler_) == 0) switch_to(0);
    if (error_) std::rethrow_exception(error_);
}

// A fiber starts on a context of its own; from then on _setjmp and _longjmp move between stacks without system calls.
void Executor::switch_to(int next) {
    current_ = next;
    Fiber& f = *fibers_[next];
    threadIdx.x = f.thread;
    if (f.started) _longjmp(f.resume, 1);
    f.started = true;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.get();
    f.start.uc_stack.ss_size = kStackBytes;
    f.start.uc_link = nullptr;
    makecontext(&f.start, &Executor::enter_fiber, 0);
    setcontext(&f.start);
}

void Executor::enter_fiber() {
    Executor& self = get();
    try {
        (*self.body_)();
        self.finish();
        if (self.left_ == 1) self.finish_block();
    } catch (...) {
        self.error_ = std::current_exception();
    }
    if (self.error_ || --self.left_ == 0) _longjmp(self.scheduler_, 1);
    const int next = self.next_runnable();
    if (next < 0) {
        try {
            self.stuck();
        } catch (...) {
            self.error_ = std::current_exception();
        }
        _longjmp(self.scheduler_, 1);
    }
    self.switch_to(next);
}

void Executor::finish() {
    Fiber& f = fiber();
    f.done = true;
    if (!f.open_stores.empty()) fail("ends with a bulk store that no group holds", f.open_stores[0].where);
    if (!f.stores.empty()) fail("ends with a bulk store that nothing waited for", f.stores[0].where);
    if (!options.lazy) return;  // every copy was done when it was issued
    for (const auto& group : f.groups)
        if (!group.empty()) fail("ends with a cp.async that nothing waited for", group[0].where);
    if (!f.open.empty()) fail("ends with a cp.async that no group holds", f.open[0].where);
}

void Executor::finish_block() {
    for (size_t id = 0; id < barriers_.size(); ++id) {
        if (barriers_[id].arrived > 0) {
            throw std::runtime_error(
                kernel_ + ", block " + std::to_string(block_) + ": ends with " + std::to_string(barriers_[id].arrived) +
                " threads at named barrier " + std::to_string(id) + ", which nobody waits at");
        }
    }
    if (!loads_.empty()) fail("the block ends while this bulk load is under way", loads_[0].where);
    for (const Warp& warp : warps_) {
        if (!warp.open.empty()) fail("ends with a wgmma that no group holds", warp.open[0].where);
        if (!warp.groups.empty()) fail("ends with a wgmma that nothing waited for", warp.groups[0][0].where);
    }
}

int Executor::next_runnable() {
    while (true) {
        for (int i = 1; i <= threads_; ++i) {
            const int candidate = (current_ + i) % threads_;
            const Fiber& f = *fibers_[candidate];
            if (!f.done && (!f.waits_for || *f.waits_for != f.seen)) return candidate;
        }
        if (loads_.empty()) return -1;
        const BulkCopy load = loads_.back();  // lazy: nothing else is left to happen
        loads_.pop_back();
        perform(load);
    }
}

void Executor::wait(const uint64_t& counter, const char* name, const Where& where) {
    Fiber& f = fiber();
    f.waits_for = &counter;
    f.seen = counter;
    f.waits_in = name;
    f.waits_at = where;
    const int next = next_runnable();
    if (next < 0) stuck();
    if (_setjmp(f.resume) == 0) switch_to(next);
    f.waits_for = nullptr;
}

// Who waits for what, a line for each warp and place.
void Executor::stuck() {
    std::string report;
    for (int i = 0; i < threads_; ++i) {
        const Fiber& f = *fibers_[i];
        if (f.done) continue;
        const std::string line = "\n  warp " + std::to_string(f.warp) + " waits " + waits(f) + ", " + at(f.waits_at);
        if (report.find(line) == std::string::npos) report += line;
    }
    throw std::runtime_error(kernel_ + ", block " + std::to_string(block_) + ": no thread can go on:" + report);
}

std::string Executor::waits(const Fiber& f) const {
    const auto found = mbarriers_.find(f.waits_on);
    if (f.waits_on == 0 || found == mbarriers_.end()) return std::string("in ") + f.waits_in;
    const Mbarrier& b = found->second;
    return "for the end of phase " + std::to_string(b.phase) + " of mbarrier " + std::to_string(b.index) + ": " +
           std::to_string(b.pending) + " of " + std::to_string(b.expected) + " arrivals and " +
           std::to_string(b.bytes) + " bytes to come";
}

void Executor::fail(const std::string& what, const Where& where) {
    throw std::runtime_error(
        kernel_ + ", block " + std::to_string(block_) + ", thread " + std::to_string(fiber().thread) + ", " +
        at(where) + ": " + what);
}

void Executor::enter(Warp& warp, const char* name, const Where& where, void* slot) {
    if (warp.arrived > 0 && warp.name != name && std::strcmp(warp.name, name) != 0) {
        fail(
            std::string("comes to ") + name + " while lanes of its warp wait in " + warp.name + " at " + at(warp.where),
            where);
    }
    warp.name = name;
    warp.where = where;
    warp.slots[fiber().lane] = slot;
    ++warp.arrived;
}

void Executor::barrier(int id, int threads, bool waits, const Where& where) {
    if (id < 0 || id >= kBarriers || threads % kLanes != 0) fail("a named barrier with impossible operands", where);
    Barrier& b = barriers_[id];
    if (b.arrived > 0 && b.expected != threads) fail("a named barrier with two different thread counts", where);
    b.expected = threads;
    const int warp = fiber().warp;
    b.clock.resize(warps_[warp].clock.size());
    join(b.clock, warps_[warp].clock);
    if (waits) {
        b.waiting.push_back(warp);
    } else {
        ++warps_[warp].clock[warp];
    }
    if (++b.arrived < threads) {
        if (waits) wait(b.turn, "bar.sync", where);
        return;
    }
    for (int w : b.waiting) {
        const uint32_t own = warps_[w].clock[w];
        join(warps_[w].clock, b.clock);
        warps_[w].clock[w] = own + 1;
        ++warps_[w].barriers;
    }
    b.clock.clear();
    b.waiting.clear();
    b.arrived = 0;
    ++b.turn;
}

void Executor::check_range(uint32_t address, int bytes, const Where& where) {
    if (address % bytes != 0) fail("shared memory address " + std::to_string(address) + " is not aligned", where);
    if (size_t{address} + bytes > shared_.size()) {
        fail(
            "shared memory address " + std::to_string(address) + " of " + std::to_string(shared_.size()) + " bytes",
            where);
    }
}

void Executor::check_ordered(Granule& granule, bool writes, const Where& where) {
    const Clock& clock = warps_[fiber().warp].clock;
    if (granule.writer >= 0 && granule.written > clock[granule.writer]) {
        fail("no barrier orders this access after the write at " + at(granule.written_at), where);
    }
    if (!writes) return;
    if (granule.leaving > 0) fail("writes to bytes of a bulk store that nothing waited for", where);
    for (size_t w = 0; w < warps_.size(); ++w) {
        if (granule.read[w] > clock[w])
            fail("no barrier orders this write after the reads of warp " + std::to_string(w), where);
    }
}

void Executor::mark_written(Granule& granule, int lane, const Where& where) {
    const Warp& warp = warps_[fiber().warp];
    granule.writer = fiber().warp;
    granule.writer_lane = lane;
    granule.written = warp.clock[fiber().warp];
    granule.written_barriers = warp.barriers;
    granule.written_at = where;
}

void Executor::copy_async(uint32_t to, const void* from, int bytes, bool valid, const Where& where) {
    check_range(to, bytes, where);
    if (valid) {
        const auto* const source = static_cast<const unsigned char*>(from);
        const auto holds = [&](const Buffer& b) { return source >= b.begin && source + bytes <= b.begin + b.size; };
        if (reinterpret_cast<uintptr_t>(from) % bytes != 0) fail("cp.async from an unaligned address", where);
        if (!options.buffers.empty() && std::none_of(options.buffers.begin(), options.buffers.end(), holds)) {
            fail("cp.async from outside every tensor", where);
        }
    }
    Granule& granule = granules_[to / kGranule];
    if (granule.pending & words_of(to, bytes))
        fail("cp.async to bytes of one still under way, issued at " + at(granule.pending_at), where);
    check_ordered(granule, true, where);
    const Copy copy{to, bytes, valid ? from : nullptr, where};
    ++counters.copies;
    fiber().open.push_back(copy);
    if (!options.lazy) return perform(copy);
    granule.pending |= words_of(to, bytes);
    granule.pending_at = where;
}

void Executor::perform(const Copy& copy) {
    Granule& granule = granules_[copy.to / kGranule];
    granule.pending &= ~words_of(copy.to, copy.bytes);
    mark_written(granule, fiber().lane, copy.where);
    if (copy.from) {
        std::memcpy(&shared_[copy.to], copy.from, copy.bytes);
    } else {
        std::memset(&shared_[copy.to], 0, copy.bytes);
    }
}

void Executor::commit() {
    fiber().groups.push_back(std::move(fiber().open));
    fiber().open.clear();
}

void Executor::wait_copies(size_t pending) {
    auto& groups = fiber().groups;
    while (groups.size() > pending) {
        if (options.lazy) {
            for (const Copy& copy : groups.front()) perform(copy);
        }
        groups.erase(groups.begin());
    }
}

const unsigned char* Executor::read(uint32_t from, int bytes, int lane, const Where& where) {
    check_range(from, bytes, where);
    Granule& granule = granules_[from / kGranule];
    if (granule.pending & words_of(from, bytes))
        fail("reads bytes of the copy issued at " + at(granule.pending_at) + ", which nothing waited for", where);
    check_ordered(granule, false, where);
    if (granule.writer == fiber().warp && granule.writer_lane != lane &&
        granule.written_barriers == warps_[fiber().warp].barriers) {
        fail("no barrier orders this read after another lane's write at " + at(granule.written_at), where);
    }
    const int warp = fiber().warp;
    granule.read[warp] = warps_[warp].clock[warp];
    return &shared_[from];
}

void Executor::write(uint32_t to, const void* from, int bytes, int lane, const Where& where) {
    check_range(to, bytes, where);
    Granule& granule = granules_[to / kGranule];
    if (granule.pending & words_of(to, bytes))
        fail("writes over the copy issued at " + at(granule.pending_at) + ", still under way", where);
    check_ordered(granule, true, where);
    mark_written(granule, lane, where);
    std::memcpy(&shared_[to], from, bytes);
    granule.unshown |= words_of(to, bytes);
    for (uint32_t word = to; word < to + bytes; word += kBankBytes) {
        fibers_[fiber().warp * kLanes + lane]->written.push_back(word);
    }
}

// A turn serves one 4-byte word of every bank, to any number of threads: each of `threads` asks for 32 / threads words.
void Executor::count_conflicts(const uint32_t* addresses, int threads) {
    const int words = kBanks / threads;
    uint32_t seen[kBanks][kBanks];
    int turns[kBanks] = {};
    for (int i = 0; i < kBanks; ++i) {
        const uint32_t word = addresses[i / words] / kBankBytes + i % words;
        uint32_t* const words_of_bank = seen[word % kBanks];
        int& count = turns[word % kBanks];
        if (std::find(words_of_bank, words_of_bank + count, word) == words_of_bank + count)
            words_of_bank[count++] = word;
    }
    counters.bank_conflicts += *std::max_element(turns, turns + kBanks) - 1;
}

}  // namespace amskv::host
