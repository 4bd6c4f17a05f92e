// What forward and backward share: buffers that outlive a call, how rows, lanes and work are divided, and how blocks run.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "lora_linear.h"

namespace hlk {

// Below this many multiplications a hand-over between threads costs more than it wins.
constexpr int64_t serial_work = 1 << 19;
// What one thread keeps for the next call.
constexpr size_t kept_bytes = 64 << 20;
// The packed rows of a block that is larger than the smallest: half of what a processor with such blocks has as second cache.
constexpr int64_t most_block_bytes = 1 << 20;
constexpr int64_t smallest_block_rows = 128;

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Growing buffers of one thread, by number, reused from call to call.
class Arena {
public:
    template <class T> T* get(size_t slot, int64_t count) {
        if (slot >= buffers_.size()) buffers_.resize(slot + 1);
        Buffer& buffer = buffers_[slot];
        const size_t bytes = round_up(std::max<int64_t>(count, 1) * sizeof(T), 64) + 64;
        if (buffer.bytes < bytes) {
            std::free(buffer.data);
            buffer = {};
            buffer.data = std::aligned_alloc(64, bytes);
            if (buffer.data == nullptr) throw std::bad_alloc();
            buffer.bytes = bytes;
        }
        return static_cast<T*>(buffer.data);
    }
    void trim() {
        size_t total = 0;
        for (const Buffer& buffer : buffers_) total += buffer.bytes;
        if (total > kept_bytes) clear();
    }
    void clear() {
        for (Buffer& buffer : buffers_) std::free(buffer.data);
        buffers_.clear();
    }
    ~Arena() { clear(); }

private:
    struct Buffer {
        void* data = nullptr;
        size_t bytes = 0;
    };
    std::vector<Buffer> buffers_;
};

// Hands out the slots of an arena one after the other.
class Slots {
public:
    explicit Slots(Arena& arena) : arena_(arena) {}
    template <class T> T* take(int64_t count) { return arena_.get<T>(next_++, count); }
    uint32_t* zeroed(int64_t units) {
        auto* data = take<uint32_t>(units);
        std::memset(data, 0, 4 * units);
        return data;
    }

private:
    Arena& arena_;
    size_t next_ = 0;
};

// Shared by the threads of one call, owned by the thread that made it.
inline Arena& call_arena() {
    thread_local Arena arena;
    return arena;
}

// A worker's own buffers.
inline Arena& worker_arena() {
    thread_local Arena arena;
    return arena;
}

// Where a path's rows lie among those of its source and of its output. Starts are even: a pair never spans two paths.
struct Lanes {
    std::vector<int64_t> of_source, of_output;       // first lane of each path
    std::vector<int64_t> source_width, output_width; // lanes of each source and each output
};

inline Lanes lanes_of(const Group& g) {
    Lanes lanes;
    lanes.source_width.assign(g.sources.size(), 0);
    lanes.output_width.assign(g.outputs.size(), 0);
    for (const Path& path : g.paths) {
        lanes.of_source.push_back(lanes.source_width[path.source]);
        lanes.of_output.push_back(lanes.output_width[path.output]);
        lanes.source_width[path.source] += round_up(path.rows, 2);
        lanes.output_width[path.output] += round_up(path.rows, 2);
    }
    return lanes;
}

// s gate of every row, with dropout's scale, at the lanes of the sources or of the outputs; 0 where no row is.
inline std::vector<std::vector<float>> lane_factors(const Group& g, const Lanes& lanes, bool of_sources) {
    std::vector<std::vector<float>> factors;
    for (int64_t width : of_sources ? lanes.source_width : lanes.output_width) factors.emplace_back(width, 0.0f);
    for (size_t p = 0; p < g.paths.size(); ++p) {
        const Path& path = g.paths[p];
        float* to = of_sources ? factors[path.source].data() + lanes.of_source[p] : factors[path.output].data() + lanes.of_output[p];
        for (int64_t j = 0; j < path.rows; ++j) to[j] = path.gate[j] == 0.0f ? 0.0f : path.gate[j] * path.scaling * g.dropout_scale;
    }
    return factors;
}

// Fixed blocks of rows: a function of the sizes alone, so that sums over blocks do not depend on the number of threads.
// `depth` is the contraction of the strips that a block keeps.
struct Blocks {
    int64_t rows, count;

    Blocks(const Engine& engine, int64_t m, int64_t depth) : rows(m) {
        int64_t most = engine.block_rows;
        while (most > smallest_block_rows && 4 * most * engine.units(depth) > most_block_bytes) most /= 2;
        // A multiple of 8 shares out evenly among 2, 4 or 8 threads.
        const int64_t multiple = (m >= 512 ? 8 : m >= 256 ? 4 : m >= 64 ? 2 : 1) * smallest_block_rows / most;
        count = round_up(std::max<int64_t>((m + most - 1) / most, 1), std::max<int64_t>(multiple, 1));
    }
    int64_t first(int64_t block) const { return rows * block / count; }
    int64_t size(int64_t block) const { return first(block + 1) - first(block); }

    // Has a segment's tiles fetch a block of the rows of a matrix, which is read after them.
    void fetch(Segment& segment, int64_t tiles, Matrix values, int64_t columns, int64_t block) const {
        if (block >= count || values.data == nullptr || values.ld != columns) return;
        segment.fetch(values.at(first(block), 0).data, size(block) * columns * size_of(values.dtype), tiles);
    }
};

// The strips of one block (or, with `most` rows of a tile, the tiles across them): of nearly equal heights, or full ones
// and a rest where an engine pads the rows. Strips of a block lie behind each other: where one starts at row `first`, its
// units start at first * units.
struct Strips {
    int64_t rows, most, count;

    Strips(const Engine& engine, int64_t rows, int most)
        : rows(rows), most(most), count((rows + most - 1) / most),
          lower_(engine.row_step > 1 ? most : count > 0 ? rows / count : 0), higher_(engine.row_step > 1 ? 0 : rows - lower_ * count) {}
    // The higher ones come first.
    int64_t first(int64_t strip) const { return std::min(strip * lower_ + std::min(strip, higher_), rows); }
    int64_t size(int64_t strip) const { return first(strip + 1) - first(strip); }

private:
    int64_t lower_, higher_;   // rows of the lower strips, and how many have one more
};

struct Range {
    int64_t begin, end;
};

inline Range share(int64_t count, int64_t part, int64_t parts) { return {count * part / parts, count * (part + 1) / parts}; }

inline Parallel serial() {
    return {1, [](int64_t count, const std::function<void(int64_t)>& task) {
                for (int64_t i = 0; i < count; ++i) task(i);
            }};
}

inline Parallel limited(const Parallel& parallel, int64_t work) {
    return work >= serial_work && parallel.threads > 1 ? parallel : serial();
}

inline int64_t work_of(const Group& g) {
    int64_t per_row = 0;
    for (const Output& output : g.outputs) per_row += output.has_weight ? output.columns * g.sources[0].columns : 0;
    for (const Path& path : g.paths) per_row += path.rows * (g.sources[path.source].columns + g.outputs[path.output].columns);
    return g.rows * per_row;
}

// Runs the blocks of a call. With at least as many blocks as threads, a thread takes a block through all stages while it is
// in its cache; with fewer, the stages are shared out by strip and by column instead. The numbers are the same.
//
// Work has: Scratch make(Slots&, block), strip(Scratch&, s, Slots), finish(Scratch&), columns(Scratch&, part, parts, Slots),
// done(block).
template <class Work>
void run_blocks(Work& work, const Engine& engine, const Blocks& blocks, Slots& shared, const Parallel& parallel) {
    if (blocks.count >= parallel.threads) {
        parallel.run(blocks.count, [&](int64_t block) {
            EngineScope scope(engine);
            Slots slots(worker_arena());
            auto scratch = work.make(slots, block);
            for (int64_t s = 0; s < Strips(engine, blocks.size(block), engine.max_rows).count; ++s) work.strip(scratch, s, slots);
            work.finish(scratch);
            work.columns(scratch, 0, 1, slots);
            work.done(block);
            worker_arena().trim();
        });
        return;
    }
    std::vector<decltype(work.make(shared, 0))> scratches;
    std::vector<std::pair<int64_t, int64_t>> strips;
    for (int64_t block = 0; block < blocks.count; ++block) {
        scratches.push_back(work.make(shared, block));
        for (int64_t s = 0; s < Strips(engine, blocks.size(block), engine.max_rows).count; ++s) strips.emplace_back(block, s);
    }
    // What few rows need before the columns is less than a hand-over between threads.
    const bool few = blocks.rows <= few_rows;
    (few ? serial() : parallel).run(strips.size(), [&](int64_t i) {
        EngineScope scope(engine);
        Slots slots(worker_arena());
        work.strip(scratches[strips[i].first], strips[i].second, slots);
        worker_arena().trim();
    });
    for (auto& scratch : scratches) work.finish(scratch);
    // Of few rows, whose weight is read row by row, the longest pieces.
    const int64_t parts = few ? parallel.threads : 4 * parallel.threads;
    parallel.run(blocks.count * parts, [&](int64_t i) {
        EngineScope scope(engine);
        Slots slots(worker_arena());
        work.columns(scratches[i / parts], i % parts, parts, slots);
        worker_arena().trim();
    });
    for (int64_t block = 0; block < blocks.count; ++block) work.done(block);
}

}  // namespace hlk
