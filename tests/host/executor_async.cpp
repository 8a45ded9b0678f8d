// What Hopper adds to the executor: mbarriers, bulk tensor copies, warpgroup products, registers that change hands.
#include <algorithm>
#include <cstring>

#include "executor.h"
#include "host_primitives.h"

namespace amskv::host {
namespace {

constexpr int kRowBytes = 128;  // of the only swizzle there is here
constexpr int kAllWords = 15;  // of a granule
constexpr int kMbarrierAlignment = 8, kBoxAlignment = 128, kAtomBytes = 1024;

// Where a byte of a swizzled tile lies: the 16-byte chunk of a row is permuted by address bits 7 to 9.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

std::string text(int64_t value) { return std::to_string(value); }

}  // namespace

void Executor::show_writes() {
    for (const uint32_t word : fiber().written) granules_[word / kGranule].unshown &= ~(1 << word % kGranule / 4);
    fiber().written.clear();
}

const unsigned char* Executor::read_async(uint32_t from, const Where& where) {
    const unsigned char* const bytes = read(from, kGranule, kAllLanes, where);
    const Granule& granule = granules_[from / kGranule];
    if (granule.unshown != 0) {
        fail(
            "no fence.proxy.async shows the ordinary write at " + at(granule.written_at) + " to this asynchronous read",
            where);
    }
    return bytes;
}

void Executor::mbarrier_init(uint32_t at, int arrivals, const Where& where) {
    const bool fits = at % kMbarrierAlignment == 0 && at + kMbarrierAlignment <= shared_.size();
    if (!fits) fail("an mbarrier at byte " + text(at), where);
    if (arrivals < 1) fail("an mbarrier of " + text(arrivals) + " arrivals", where);
    if (mbarriers_.count(at)) fail("an mbarrier is initialised twice", where);
    if (mbarriers_.size() == kMbarriers) fail("too many mbarriers for the executor", where);
    Mbarrier b;
    b.index = static_cast<int>(mbarriers_.size());
    b.expected = b.pending = arrivals;
    b.arrived = warps_[fiber().warp].clock;
    b.released.assign(b.arrived.size(), 0);
    b.where = where;
    mbarriers_[at] = b;
}

void Executor::mbarrier_show() {
    for (auto& [at, b] : mbarriers_) b.shown = true;
}

Mbarrier& Executor::mbarrier(uint32_t at, const Where& where) {
    const auto found = mbarriers_.find(at);
    if (found == mbarriers_.end()) fail("no mbarrier is at byte " + text(at), where);
    return found->second;
}

// Ends the phase if nothing is left to come.
void Executor::complete(Mbarrier& b) {
    if (b.pending > 0 || b.bytes > 0) return;
    b.pending = b.expected;
    ++b.phase;
    join(b.released, b.arrived);
}

void Executor::mbarrier_arrive(uint32_t at, int64_t bytes, const Where& where) {
    Mbarrier& b = mbarrier(at, where);
    if (b.pending == 0) fail("mbarrier " + text(b.index) + " has all its arrivals already", where);
    Warp& warp = warps_[fiber().warp];
    join(b.arrived, warp.clock);
    ++warp.clock[fiber().warp];
    b.bytes += bytes;
    --b.pending;
    complete(b);
}

void Executor::mbarrier_wait(uint32_t at, uint32_t parity, const Where& where) {
    Mbarrier& b = mbarrier(at, where);
    fiber().waits_on = at;
    while ((b.phase & 1) == (parity & 1)) wait(b.phase, "mbarrier", where);
    fiber().waits_on = 0;
    join(warps_[fiber().warp].clock, b.released);
}

// Calls f(shared address, global address or null where the tensor ends) for every 16 bytes of a box.
template <typename F>
void Executor::each_row(const BulkCopy& copy, F&& f) const {
    const TensorMap& map = copy.map;
    for (int row = 0; row < map.box_rows; ++row) {
        const int64_t at[4] = {copy.start[0], copy.start[1] + row, copy.start[2], copy.start[3]};
        bool inside = true;
        for (int i = 1; i < 4; ++i) inside = inside && at[i] >= 0 && at[i] < map.dims[i];
        for (int chunk = 0; chunk < kRowBytes / kGranule; ++chunk) {
            const int64_t column = at[0] + chunk * kGranule / 2;
            unsigned char* const global =
                map.base + column * 2 + at[1] * map.strides[0] + at[2] * map.strides[1] + at[3] * map.strides[2];
            const bool there = inside && column >= 0 && column < map.dims[0];
            f(swizzled(copy.shared + row * kRowBytes + chunk * kGranule), there ? global : nullptr);
        }
    }
}

void Executor::bulk_load(const BulkCopy& copy) {
    Mbarrier& b = mbarrier(copy.barrier, copy.where);
    if (!b.shown) fail("no fence shows this mbarrier to the copy engine", copy.where);
    if (copy.shared % kBoxAlignment != 0) fail("a box at a shared address that is not aligned", copy.where);
    check_range(copy.shared, 1, copy.where);
    check_range(copy.shared + copy.map.box_rows * kRowBytes - 1, 1, copy.where);
    each_row(copy, [&](uint32_t to, const unsigned char*) {
        Granule& granule = granules_[to / kGranule];
        if (granule.pending > 0) fail("loads over a copy still under way", copy.where);
        check_ordered(granule, true, copy.where);
        granule.pending = kAllWords;
        granule.pending_at = copy.where;
    });
    ++counters.bulk_loads;
    if (options.lazy) {
        loads_.push_back(copy);
    } else {
        perform(copy);
    }
}

void Executor::perform(const BulkCopy& load) {
    Mbarrier& b = mbarrier(load.barrier, load.where);
    each_row(load, [&](uint32_t to, const unsigned char* from) {
        Granule& granule = granules_[to / kGranule];
        granule.pending = granule.unshown = 0;
        granule.writer = static_cast<int>(warps_.size()) + b.index;
        granule.writer_lane = -1;
        granule.written = static_cast<uint32_t>(b.phase + 1);
        granule.written_at = load.where;
        if (from) {
            std::memcpy(&shared_[to], from, kGranule);
        } else {
            std::memset(&shared_[to], 0, kGranule);
        }
    });
    b.bytes -= load.map.box_rows * kRowBytes;
    if (b.bytes < 0) {
        fail("mbarrier " + text(b.index) + " counts " + text(-b.bytes) + " bytes more than were expected", load.where);
    }
    b.arrived[warps_.size() + b.index] = static_cast<uint32_t>(b.phase + 1);
    complete(b);
}

void Executor::bulk_store(const BulkCopy& copy) {
    if (copy.shared % kBoxAlignment != 0) fail("a box at a shared address that is not aligned", copy.where);
    each_row(copy, [&](uint32_t from, unsigned char* to) {
        const unsigned char* const bytes = read_async(from, copy.where);
        if (options.lazy) {
            ++granules_[from / kGranule].leaving;
        } else if (to) {
            std::memcpy(to, bytes, kGranule);
        }
    });
    ++counters.bulk_stores;
    fiber().open_stores.push_back(copy);
}

void Executor::bulk_commit() {
    Fiber& f = fiber();
    f.stores.insert(f.stores.end(), f.open_stores.begin(), f.open_stores.end());
    f.open_stores.clear();
}

void Executor::bulk_wait_read() {
    const int warp = fiber().warp;
    for (const BulkCopy& copy : fiber().stores) {
        each_row(copy, [&](uint32_t from, unsigned char* to) {
            Granule& granule = granules_[from / kGranule];
            granule.read[warp] = warps_[warp].clock[warp];
            if (!options.lazy) return;
            --granule.leaving;
            if (to) std::memcpy(to, &shared_[from], kGranule);
        });
    }
    fiber().stores.clear();
}

void Executor::multiply(const Product& product) {
    Warp& warp = warps_[fiber().warp];
    if (!warp.fenced) fail("no wgmma.fence orders the registers of this product", product.where);
    ++counters.warpgroup_products;
    warp.open.push_back(product);
    if (!options.lazy) perform(product);
}

void Executor::commit_products() {
    Warp& warp = warps_[fiber().warp];
    warp.groups.push_back(std::move(warp.open));
    warp.open.clear();
}

void Executor::wait_products(size_t pending) {
    Warp& warp = warps_[fiber().warp];
    warp.fenced = false;
    while (warp.groups.size() > pending) {
        if (options.lazy) {
            for (const Product& product : warp.groups.front()) perform(product);
        }
        warp.groups.erase(warp.groups.begin());
    }
}

namespace {

struct Operand {
    uint32_t start, panel_bytes, eight_rows;
};

// Element (row, column) of an operand whose rows of 64 elements lie one after another: byte address of its 16 bytes.
uint32_t chunk_of(const Operand& o, int row, int column) {
    return swizzled(
        o.start + column / 64 * o.panel_bytes + row / 8 * o.eight_rows + row % 8 * kRowBytes + column % 64 * 2);
}

}  // namespace

// d = or += a · b for the warp's 16 rows, in fp32.
void Executor::perform(const Product& p) {
    const auto decode = [&](uint64_t bits) {
        if (bits >> 62 != 1 || (bits >> 49 & 7) != 0) fail("a wgmma operand that is not permuted by 128 bytes", p.where);
        const auto field = [&](int shift) { return static_cast<uint32_t>(bits >> shift & 0x3fff) << 4; };
        const Operand o{field(0), field(16), field(32)};
        if ((o.start & ~(kRowBytes - 1)) % kAtomBytes != 0) fail("a wgmma operand that begins inside 8 rows", p.where);
        return o;
    };
    const auto value = [&](uint16_t bits) { return p.half ? to_float(bits, Half{}) : to_float(bits, BFloat16{}); };
    const auto load = [&](const Operand& o, int row, int column, float* to) {  // 8 elements
        uint16_t bits[8];
        std::memcpy(bits, read_async(chunk_of(o, row, column), p.where), kGranule);
        for (int i = 0; i < 8; ++i) to[i] = value(bits[i]);
    };
    float a[16][16], sums[16][128] = {};
    for (int lane = 0; lane < kLanes && p.a[0] != nullptr; ++lane) {
        for (int i = 0; i < 8; ++i) {
            const uint32_t pair = p.a[lane][i / 2];
            a[lane / 4 + i / 2 % 2 * 8][2 * (lane % 4) + i / 4 * 8 + i % 2] = value(pair >> 16 * (i % 2) & 0xffff);
        }
    }
    if (p.a[0] == nullptr) {
        const Operand left = decode(p.a_operand);
        const int first = fiber().warp % 4 * 16;
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < 16; column += 8) load(left, first + row, column, &a[row][column]);
    }
    const Operand right = decode(p.b_operand);
    static thread_local float b[128 * 16];  // [16, columns] where b is read across its rows, else [columns, 16]
    const int rows = p.b_across_rows ? 16 : p.columns, width = p.b_across_rows ? p.columns : 16;
    for (int row = 0; row < rows; ++row)
        for (int column = 0; column < width; column += 8) load(right, row, column, &b[row * width + column]);
    const int k_step = p.b_across_rows ? p.columns : 1, column_step = p.b_across_rows ? 1 : 16;
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            for (int column = 0; column < p.columns; ++column)
                sums[row][column] += a[row][k] * b[k * k_step + column * column_step];
    for (int lane = 0; lane < kLanes; ++lane)
        for (int i = 0; i < p.columns / 2; ++i) {
            float& d = p.d[lane][i];
            d = (p.accumulate ? d : 0) + sums[lane / 4 + i / 2 % 2 * 8][i / 4 * 8 + 2 * (lane % 4) + i % 2];
        }
}

void Executor::set_registers(int count, bool more, const Where& where) {
    Warp& warp = warps_[fiber().warp];
    if (count % 8 != 0 || count < 24 || count > 256 || more != (count > warp.registers)) {
        fail("setmaxnreg from " + text(warp.registers) + " to " + text(count) + " registers", where);
    }
    while (more && registers_free_ < (count - warp.registers) * kLanes) wait(registers_turn_, "setmaxnreg", where);
    registers_free_ += (warp.registers - count) * kLanes;
    warp.registers = count;
    ++registers_turn_;
}

}  // namespace amskv::host
