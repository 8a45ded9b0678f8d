#include "binding/tables.h"

#include <algorithm>
#include <vector>

#include "binding/checks.h"

namespace amskv {
namespace {

constexpr int32_t kRowsMask = (1 << kRowsBits) - 1;

// How many rows of each page may be read: all of them, but for the pages that this call writes.
class Readable {
public:
    explicit Readable(const Pool& pool) {
        if (rows_.size() < static_cast<size_t>(pool.num_pages)) rows_.resize(pool.num_pages, kAll);
    }
    ~Readable() {  // for the next call on this thread
        for (const int64_t page : written_) rows_[page] = kAll;
        written_.clear();
    }
    Readable(const Readable&) = delete;

    void write(int64_t page, int32_t kept) {
        if (rows_[page] != kAll) refuse("write_slots name one page twice; every page written must be another one");
        rows_[page] = static_cast<uint8_t>(kept);
        written_.push_back(page);
    }
    int32_t of(int64_t page) const { return rows_[page]; }

private:
    static constexpr uint8_t kAll = 255;  // above every page_size
    // Kept by the thread, so that no call allocates once the pool is known.
    static thread_local std::vector<uint8_t> rows_;
    static thread_local std::vector<int64_t> written_;
};

thread_local std::vector<uint8_t> Readable::rows_;
thread_local std::vector<int64_t> Readable::written_;

// How many rows a slot names, of a page that is there.
int32_t rows_of(const char* name, const Pool& pool, int64_t first, int32_t slot) {
    const int32_t rows = slot & kRowsMask;
    if (slot < 0 || rows > pool.page_size) {
        refuse(
            name, " hold ", slot, " (page_offset ", slot >> kRowsBits, ", ", rows,
            " rows); an entry must be page_offset << ", kRowsBits, " | rows with at most page_size = ", pool.page_size,
            " rows");
    }
    const int64_t page = first + (slot >> kRowsBits);
    if (rows > 0 && (page < 0 || page >= pool.num_pages))
        refuse(name, " point to page ", page, "; the pool has pages 0 … ", pool.num_pages - 1);
    return rows;
}

void check_written(
    const Pool& pool, int64_t first, const int32_t* slots, int32_t count, int32_t tokens, Readable& readable) {
    int64_t total = 0;
    int32_t lead = 0;  // rows of the first page
    for (int32_t i = 0; i < count; ++i) {
        const int32_t rows = rows_of("write_slots", pool, first, slots[i]);
        if (total == 0) lead = rows;
        total += rows;
    }
    const int64_t kept = total - tokens;  // rows that the first page already holds
    if (total > 0 && (kept < 0 || kept >= lead)) {
        refuse(
            "write_slots name ", total, " rows for the ", tokens, " rows of k; they must name ", tokens,
            ", plus the rows that the first page already holds");
    }
    bool leads = true;
    for (int32_t i = 0; i < count; ++i) {
        if ((slots[i] & kRowsMask) == 0) continue;
        readable.write(first + (slots[i] >> kRowsBits), leads ? static_cast<int32_t>(kept) : 0);
        leads = false;
    }
}

}  // namespace

void check_tables(
    const Pool& pool, const SlotTable& read, const SlotTable& write, int32_t batch, int32_t kv_heads, Lengths lengths) {
    const auto for_each_head = [&](const SlotTable& table, auto&& check) {
        for (int32_t b = 0; b < batch && table.count > 0; ++b) {
            for (int32_t h = 0; h < kv_heads; ++h)
                check(
                    int64_t{pool.arena[b * kv_heads + h]},
                    table.data + b * table.batch_stride + h * table.head_stride, lengths.of(b));
        }
    };
    for_each_head(read, [&](int64_t first, const int32_t* slots, int32_t) {
        for (int32_t i = 0; i < read.count; ++i) rows_of("read_slots", pool, first, slots[i]);
    });
    if (write.count == 0) return;
    Readable readable(pool);
    for_each_head(write, [&](int64_t first, const int32_t* slots, int32_t tokens) {
        check_written(pool, first, slots, write.count, tokens, readable);
    });
    for_each_head(read, [&](int64_t first, const int32_t* slots, int32_t) {
        for (int32_t i = 0; i < read.count; ++i) {
            const int64_t page = first + (slots[i] >> kRowsBits);
            const int32_t rows = slots[i] & kRowsMask;
            if (rows > 0 && rows > readable.of(page)) {
                refuse(
                    "page ", page,
                    " is both read and written in one call; read_slots and write_slots must not name the same rows");
            }
        }
    });
}

void check_keep(
    const Pool& pool, const SlotTable& source, const SlotTable& target, const Keep& keep, int32_t batch,
    int32_t kv_heads, int32_t tokens) {
    check_tables(pool, source, target, batch, kv_heads, {keep.count});
    const int64_t page_size = pool.page_size, paged = source.count * page_size, all = paged + tokens;
    for (int64_t head = 0; head < int64_t{batch} * kv_heads; ++head) {
        const auto of_head = [&](const SlotTable& table) {
            return table.data + head / kv_heads * table.batch_stride + head % kv_heads * table.head_stride;
        };
        const int32_t *const slots = of_head(source), *const taking = of_head(target);
        int64_t named = 0, last = -1;
        for (int32_t i = 0; i < target.count; ++i) named += taking[i] & kRowsMask;
        if (named != keep.count) refuse("dst_slots name ", named, " rows; they must name the ", keep.count, " of keep");
        for (int32_t i = 0; i < keep.count; ++i) {
            const int64_t key = keep.data[head * keep.count + i];
            if (key < 0 || key >= all) refuse("keep holds ", key, "; the keys have indices 0 … ", all - 1);
            if (key < paged && key % page_size >= (slots[key / page_size] & kRowsMask))
                refuse("keep holds ", key, ", a row that src_slots do not name");
            if (key <= last) refuse("keep does not ascend; its indices must ascend, each once");
            last = key;
        }
    }
}

}  // namespace amskv
