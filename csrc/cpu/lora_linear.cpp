#include "lora_linear.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

namespace hlk {

const char* const stats_columns[num_stats_columns] = {"hidden_sq", "grad_A_sq", "grad_B_sq", "abs_A_grad_A",
                                                      "abs_B_grad_B", "gate_grad", "taylor_sq"};

namespace {

// A block's rows packed at K = 2048 in bf16 take 0.5 MB: they stay in the second cache of one core.
constexpr int64_t block_rows = 128;
// Below this many multiplications a hand-over between threads costs more than it wins.
constexpr int64_t serial_work = 1 << 19;
// What one thread keeps for the next call.
constexpr size_t kept_bytes = 64 << 20;
// Partial sums of the gradients; more is avoided by larger blocks.
constexpr int64_t most_partial_bytes = 128 << 20;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

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

// Shared by the threads of one call, owned by the thread that made it; its workers' own buffers are `worker_arena`.
thread_local Arena call_arena;
thread_local Arena worker_arena;

// Where a path's rows lie among those of its source and of its output. Starts are even: a pair never spans two paths.
struct Lanes {
    std::vector<int64_t> of_source, of_output;       // first lane of each path
    std::vector<int64_t> source_width, output_width; // lanes of each source and each output
};

Lanes lanes_of(const Group& g) {
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

// Fixed blocks of rows: a function of M alone, so that sums over blocks do not depend on the number of threads.
struct Blocks {
    int64_t rows, count;

    explicit Blocks(int64_t m) : rows(m), count((m + block_rows - 1) / block_rows) {
        // A multiple of 8 shares out evenly among 2, 4 or 8 threads.
        const int64_t multiple = m >= 512 ? 8 : m >= 256 ? 4 : m >= 64 ? 2 : 1;
        count = round_up(std::max<int64_t>(count, 1), multiple);
    }
    int64_t first(int64_t block) const { return rows * block / count; }
    int64_t size(int64_t block) const { return first(block + 1) - first(block); }
};

// The strips of one block: nearly equal heights.
struct Strips {
    int64_t rows, count;

    Strips(int64_t rows, int max_rows) : rows(rows), count((rows + max_rows - 1) / max_rows) {}
    int64_t first(int64_t strip) const { return rows * strip / count; }
    int64_t size(int64_t strip) const { return first(strip + 1) - first(strip); }
};

// Zero what a closed row (gate 0) contributes: its numbers may be anything, and 0 times nan is nan.
void close_lanes(const Engine& engine, const Path& path, int64_t first_lane, uint32_t* panel, int64_t stride) {
    for (int64_t j = 0; j < path.rows; ++j) {
        if (path.gate[j] != 0.0f) continue;
        const int64_t lane = first_lane + j;
        uint32_t* units = panel + lane / engine.unit * stride;
        const uint32_t kept = engine.unit == 1 ? 0 : lane % 2 == 0 ? 0xFFFF0000u : 0x0000FFFFu;
        for (int64_t c = 0; c < stride; ++c) units[c] &= kept;
    }
}

void pack_panels(const Engine& engine, const Weight& weight, int64_t columns, int64_t depth, bool along_rows, uint32_t* out,
                 int64_t panel) {
    const int width = engine.panel();
    const int64_t first = panel * width, here = std::min<int64_t>(width, columns - first);
    uint32_t* to = out + panel * width * engine.units(depth);
    if (here < width) std::memset(to, 0, 4 * width * engine.units(depth));
    if (along_rows) {
        engine.pack_rows(weight.values.at(first, 0), Keep{}, here, depth, to, width);
    } else {
        engine.pack_columns(weight.values.at(0, first), depth, here, to, width);
    }
}

Parallel limited(const Parallel& parallel, int64_t work) {
    if (work >= serial_work && parallel.threads > 1) return parallel;
    return {1, [](int64_t count, const std::function<void(int64_t)>& task) {
                for (int64_t i = 0; i < count; ++i) task(i);
            }};
}

int64_t work_of(const Group& g) {
    int64_t per_row = 0;
    for (const Output& output : g.outputs) per_row += output.has_weight ? output.columns * g.sources[0].columns : 0;
    for (const Path& path : g.paths) per_row += path.rows * (g.sources[path.source].columns + g.outputs[path.output].columns);
    return g.rows * per_row;
}

// The packed weights of a call: the caller's, or made now.
std::vector<const uint32_t*> weight_panels(const Group& g, bool for_forward, Slots& slots, const Parallel& parallel) {
    std::vector<const uint32_t*> panels;
    const int64_t in_features = g.sources[0].columns;
    for (const Output& output : g.outputs) {
        const uint32_t* pack = nullptr;
        const bool needed = output.has_weight && g.rows > few_rows && (for_forward || output.grad_out.data != nullptr);
        if (needed) {
            pack = for_forward ? output.weight.forward_pack : output.weight.backward_pack;
            if (pack == nullptr) {
                const int64_t columns = for_forward ? output.columns : in_features;
                const int64_t depth = for_forward ? in_features : output.columns;
                auto* made = slots.take<uint32_t>(packed_units(*g.engine, columns, depth));
                pack_weight(*g.engine, output.weight, output.columns, in_features, for_forward, made, parallel);
                pack = made;
            }
        }
        panels.push_back(pack);
    }
    return panels;
}

// Runs the blocks of a call. With at least as many blocks as threads, a thread takes a block through all stages while it is
// in its cache; with fewer, the stages are shared out by strip and by column instead. The numbers are the same.
//
// Work has: Scratch make(Slots&, block), strip(Scratch&, s), finish(Scratch&), columns(Scratch&, part, parts).
template <class Work>
void run_blocks(Work& work, const Blocks& blocks, int max_rows, Slots& shared, const Parallel& parallel) {
    if (blocks.count >= parallel.threads) {
        parallel.run(blocks.count, [&](int64_t block) {
            Slots slots(worker_arena);
            auto scratch = work.make(slots, block);
            for (int64_t s = 0; s < Strips(blocks.size(block), max_rows).count; ++s) work.strip(scratch, s, slots);
            work.finish(scratch);
            work.columns(scratch, 0, 1, slots);
            worker_arena.trim();
        });
        return;
    }
    std::vector<decltype(work.make(shared, 0))> scratches;
    std::vector<std::pair<int64_t, int64_t>> strips;
    for (int64_t block = 0; block < blocks.count; ++block) {
        scratches.push_back(work.make(shared, block));
        for (int64_t s = 0; s < Strips(blocks.size(block), max_rows).count; ++s) strips.emplace_back(block, s);
    }
    parallel.run(strips.size(), [&](int64_t i) {
        Slots slots(worker_arena);
        work.strip(scratches[strips[i].first], strips[i].second, slots);
        worker_arena.trim();
    });
    for (auto& scratch : scratches) work.finish(scratch);
    const int64_t parts = 4 * parallel.threads;
    parallel.run(blocks.count * parts, [&](int64_t i) {
        Slots slots(worker_arena);
        work.columns(scratches[i / parts], i % parts, parts, slots);
        worker_arena.trim();
    });
}

// The base product of a tile for few rows, from the weight as it lies, in float32.
// out[row][c] = sum_k x[row][k] w[c][k]
void few_along_rows(const Engine& engine, Matrix x, int64_t rows, Matrix w, int64_t columns, int64_t depth, float* out,
                    int64_t out_ld) {
    engine.dot(Dot{rows, columns, depth, x, w, out, out_ld});
}

// out[row][c] = sum_k strip[k][row] w[k][c]
void few_along_columns(const Engine& engine, const uint32_t* strip, int64_t rows, Matrix w, int64_t columns, int64_t depth,
                       float* out, int64_t out_ld) {
    Outer outer;
    outer.count = static_cast<int>(rows);
    outer.columns = static_cast<int>(columns);
    outer.rows = depth;
    outer.coef = strip;
    outer.coef_stride = rows;
    outer.u = w;
    outer.out = out;
    outer.out_ld = out_ld;
    engine.outer(outer);
}

// A strip times a narrow panel, vector by vector, into float32 [rows][width].
void low_rank_product(const Engine& engine, const uint32_t* strip, int64_t rows, const uint32_t* panel, int64_t width,
                      int64_t units, float* out) {
    for (int64_t lane = 0; lane < width; lane += engine.lanes) {
        const Segment segment{strip, rows, panel + lane, width, units};
        Tile tile;
        tile.rows = static_cast<int>(rows);
        tile.vectors = 1;
        tile.columns = engine.lanes;
        tile.segments = &segment;
        tile.num_segments = 1;
        tile.out = out + lane;
        tile.out_ld = width;
        engine.tile(tile);
    }
}

// Up to 64 values in another dtype, by a tile without segments: the engine's own conversion and rounding.
void copy_row(const Engine& engine, Matrix from, int64_t count, void* to, DType dtype) {
    for (int64_t c = 0; c < count; c += engine.panel()) {
        Tile tile;
        tile.rows = 1;
        tile.columns = static_cast<int>(std::min<int64_t>(engine.panel(), count - c));
        tile.base = from.at(0, c);
        tile.out = static_cast<char*>(to) + c * size_of(dtype);
        tile.out_dtype = dtype;
        engine.tile(tile);
    }
}

struct Range {
    int64_t begin, end;
};

Range share(int64_t count, int64_t part, int64_t parts) { return {count * part / parts, count * (part + 1) / parts}; }

class Forward {
public:
    Forward(Group& group, const Parallel& parallel)
        : g_(group), e_(*group.engine), parallel_(limited(parallel, work_of(group))), blocks_(group.rows),
          lanes_(lanes_of(group)), shared_(call_arena) {}

    void run() {
        weights_ = weight_panels(g_, true, shared_, parallel_);
        pack_paths();
        run_blocks(*this, blocks_, e_.max_rows, shared_, parallel_);
        call_arena.trim();
    }

    struct Scratch {
        int64_t first;                   // row of the block
        Strips strips;
        uint32_t* x = nullptr;           // strips [units(K)][rows]
        std::vector<uint32_t*> low_rank; // per output: strips [units(lanes)][rows] of s gate h
    };

    Scratch make(Slots& slots, int64_t block) {
        Scratch scratch{blocks_.first(block), Strips(blocks_.size(block), e_.max_rows), nullptr, {}};
        const int64_t rows = blocks_.size(block);
        if (needs_x()) scratch.x = slots.take<uint32_t>(rows * e_.units(g_.sources[0].columns));
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            scratch.low_rank.push_back(slots.take<uint32_t>(rows * e_.units(lanes_.output_width[i])));
        }
        return scratch;
    }

    // Packs a strip of x, computes its rows of hidden, and packs them for the outputs.
    void strip(Scratch& scratch, int64_t s, Slots slots) {
        const int64_t from = scratch.strips.first(s), rows = scratch.strips.size(s), row = scratch.first + from;
        const Source& x = g_.sources[0];
        uint32_t* packed_x = nullptr;
        if (needs_x()) {
            packed_x = scratch.x + from * e_.units(x.columns);
            e_.pack_rows(x.values.at(row, 0), Keep{}, rows, x.columns, packed_x, rows);
        }
        std::vector<float*> staged(g_.outputs.size(), nullptr);
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            if (lanes_.output_width[i] == 0) continue;
            staged[i] = slots.take<float>(rows * lanes_.output_width[i]);
            std::memset(staged[i], 0, 4 * rows * lanes_.output_width[i]);
        }
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const Source& source = g_.sources[key];
            if (g_.dropout && source.keep_out != nullptr) draw_keep(source, key, row, rows);
            const int64_t width = round_up(lanes_.source_width[key], e_.lanes);
            if (width == 0) continue;
            const uint32_t* strip = packed_x;
            if (key != 0 || g_.dropout || strip == nullptr) {
                auto* dropped = slots.take<uint32_t>(rows * e_.units(source.columns));
                e_.pack_rows(source.values.at(row, 0), source.keep.at(row, 0), rows, source.columns, dropped, rows);
                strip = dropped;
            }
            auto* h = slots.take<float>(rows * width);
            low_rank_product(e_, strip, rows, lora_A_[key], width, e_.units(source.columns), h);
            for (size_t p = 0; p < g_.paths.size(); ++p) {
                const Path& path = g_.paths[p];
                if (path.source != static_cast<int>(key)) continue;
                store_hidden(path, p, h, width, row, rows, staged[path.output]);
            }
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const int64_t width = lanes_.output_width[i];
            if (width == 0) continue;
            e_.pack_rows({staged[i], DType::f32, width}, Keep{}, rows, width,
                         scratch.low_rank[i] + from * e_.units(width), rows);
        }
    }

    void finish(Scratch&) {}

    void columns(Scratch& scratch, int64_t part, int64_t parts, Slots slots) {
        const int width = e_.panel();
        const bool few = g_.rows <= few_rows;
        float* base = few && g_.has_weights() ? slots.take<float>(few_rows * width) : nullptr;
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const Output& output = g_.outputs[i];
            const int64_t depth = g_.sources[0].columns, lane_units = e_.units(lanes_.output_width[i]);
            const int64_t padded = round_up(output.columns, width);
            const Range range = share(padded / width, part, parts);
            for (int64_t panel = range.begin; panel < range.end; ++panel) {
                const int64_t column = panel * width;
                const int64_t here = std::min<int64_t>(width, output.columns - column);
                for (int64_t s = 0; s < scratch.strips.count; ++s) {
                    const int64_t from = scratch.strips.first(s), rows = scratch.strips.size(s), row = scratch.first + from;
                    Segment segments[2];
                    Tile tile;
                    tile.segments = segments;
                    if (lane_units > 0) {
                        segments[tile.num_segments++] = {scratch.low_rank[i] + from * lane_units, rows, lora_B_[i] + column,
                                                         padded, lane_units};
                    }
                    if (output.has_weight && !few) {
                        segments[tile.num_segments++] = {scratch.x + from * e_.units(depth), rows,
                                                         weights_[i] + column * e_.units(depth), width, e_.units(depth)};
                    } else if (output.has_weight) {
                        const Weight& weight = output.weight;
                        if (weight.transposed) {
                            few_along_columns(e_, scratch.x + from * e_.units(depth), rows, weight.values.at(0, column),
                                                   here, depth, base, width);
                        } else {
                            few_along_rows(e_, g_.sources[0].values.at(row, 0), rows, weight.values.at(column, 0), here,
                                                depth, base, width);
                        }
                        tile.base = {base, DType::f32, width};
                    } else {
                        tile.base = output.base.at(row, column);
                    }
                    tile.rows = static_cast<int>(rows);
                    tile.columns = static_cast<int>(here);
                    tile.vectors = here > e_.lanes ? 2 : 1;
                    if (output.bias.data != nullptr) tile.bias = output.bias.at(0, column);
                    tile.out = static_cast<char*>(output.out) + (row * output.columns + column) * size_of(g_.dtype);
                    tile.out_dtype = g_.dtype;
                    tile.out_ld = output.columns;
                    e_.tile(tile);
                }
            }
        }
    }

private:
    bool needs_x() const { return g_.has_weights() || (lanes_.source_width[0] > 0 && !g_.dropout); }

    void pack_paths() {
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const int64_t width = round_up(lanes_.source_width[key], e_.lanes);
            lora_A_.push_back(shared_.zeroed(width * e_.units(g_.sources[key].columns)));
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const int64_t padded = round_up(g_.outputs[i].columns, e_.panel());
            lora_B_.push_back(shared_.zeroed(padded * e_.units(lanes_.output_width[i])));
        }
        parallel_.run(g_.paths.size(), [&](int64_t p) {
            const Path& path = g_.paths[p];
            if (path.rows == 0) return;
            const Source& source = g_.sources[path.source];
            e_.pack_rows(path.lora_A, Keep{}, path.rows, source.columns, lora_A_[path.source] + lanes_.of_source[p],
                         round_up(lanes_.source_width[path.source], e_.lanes));
            const int64_t padded = round_up(g_.outputs[path.output].columns, e_.panel());
            uint32_t* panel = lora_B_[path.output];
            e_.pack_rows(path.lora_B, Keep{}, g_.outputs[path.output].columns, path.rows,
                         panel + lanes_.of_output[p] / e_.unit * padded, padded);
            close_lanes(e_, path, lanes_.of_output[p], panel, padded);
        });
    }

    void draw_keep(const Source& source, size_t key, int64_t row, int64_t rows) const {
        for (int64_t i = 0; i < rows; ++i) {
            e_.keep_bits(g_.dropout_key, static_cast<uint32_t>(row + i), static_cast<uint32_t>(key), source.columns,
                         g_.dropout_threshold, source.keep_out + (row + i) * source.keep.ld);
        }
    }

    void store_hidden(const Path& path, size_t p, const float* h, int64_t width, int64_t row, int64_t rows,
                      float* staged) const {
        const int64_t lane = lanes_.of_source[p], staged_width = lanes_.output_width[path.output];
        for (int64_t i = 0; i < rows; ++i) {
            float* to = staged + i * staged_width + lanes_.of_output[p];
            const float* from = h + i * width + lane;
            for (int64_t j = 0; j < path.rows; ++j) {
                const float gate = path.gate[j];
                to[j] = gate == 0.0f ? 0.0f : from[j] * g_.dropout_scale * (gate * path.scaling);
            }
            if (g_.hidden == nullptr) continue;
            float scaled[64];
            for (int64_t j = 0; j < path.rows; j += 64) {
                const int64_t count = std::min<int64_t>(64, path.rows - j);
                for (int64_t c = 0; c < count; ++c) scaled[c] = from[j + c] * g_.dropout_scale;
                copy_row(e_, {scaled, DType::f32, 64}, count,
                         static_cast<char*>(g_.hidden) +
                             ((row + i) * g_.hidden_ld + path.hidden_column + j) * size_of(g_.dtype), g_.dtype);
            }
        }
    }

    Group& g_;
    const Engine& e_;
    Parallel parallel_;
    Blocks blocks_;
    Lanes lanes_;
    Slots shared_;
    std::vector<const uint32_t*> weights_;
    std::vector<uint32_t*> lora_A_;   // per source: [units(columns)][lanes], lanes a multiple of a vector
    std::vector<uint32_t*> lora_B_;   // per output: [units(lanes)][N rounded up to a panel]
};

class Backward {
public:
    Backward(Group& group, const Parallel& parallel)
        : g_(group), e_(*group.engine), parallel_(limited(parallel, 2 * work_of(group))), lanes_(lanes_of(group)),
          blocks_(group.rows), shared_(call_arena) {
        for (size_t p = 0; p < g_.paths.size(); ++p) {
            const Path& path = g_.paths[p];
            statistics_ = statistics_ || path.stats != nullptr;
            grads_A_ = grads_A_ || path.grad_A != nullptr;
            grads_B_ = grads_B_ || path.grad_B != nullptr;
        }
        int64_t floats = 0;
        for (size_t key = 0; key < g_.sources.size(); ++key) floats += lanes_.source_width[key] * g_.sources[key].columns;
        for (size_t i = 0; i < g_.outputs.size(); ++i) floats += lanes_.output_width[i] * g_.outputs[i].columns;
        while (blocks_.count > 8 && 4 * blocks_.count * floats > most_partial_bytes) blocks_.count /= 2;
    }

    void run() {
        if (g_.sources[0].grad != nullptr) weights_ = weight_panels(g_, false, shared_, parallel_);
        pack_paths();
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const int64_t size = shadow_A() ? blocks_.count * lanes_.source_width[key] * g_.sources[key].columns : 0;
            partial_A_.push_back(shared_.take<float>(size));
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const int64_t size = shadow_B() ? blocks_.count * lanes_.output_width[i] * g_.outputs[i].columns : 0;
            partial_B_.push_back(shared_.take<float>(size));
        }
        int64_t width = 0;
        for (int64_t lanes : lanes_.output_width) width += lanes;
        partial_sums_ = shared_.take<float>(statistics_ ? 2 * blocks_.count * width : 0);
        sums_width_ = width;
        run_blocks(*this, blocks_, e_.max_rows, shared_, parallel_);
        merge();
        call_arena.trim();
    }

    struct Scratch {
        int64_t block, first;
        Strips strips;
        std::vector<uint32_t*> grad_out;   // per output: strips [units(N)][rows]
        std::vector<uint32_t*> low_rank;   // per source: strips [units(lanes)][rows] of s gate q
        std::vector<float*> q;             // per source: [rows of the block][lanes]
        std::vector<uint32_t*> q_coef;     // per source: [units(rows)][lanes]
        std::vector<uint32_t*> h_coef;     // per output: [units(rows)][lanes]
    };

    Scratch make(Slots& slots, int64_t block) {
        Scratch scratch{block, blocks_.first(block), Strips(blocks_.size(block), e_.max_rows), {}, {}, {}, {}, {}};
        const int64_t rows = blocks_.size(block);
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const bool packed = g_.outputs[i].grad_out.data != nullptr && needs_strip(i);
            scratch.grad_out.push_back(slots.take<uint32_t>(packed ? rows * e_.units(g_.outputs[i].columns) : 0));
            scratch.h_coef.push_back(slots.take<uint32_t>(shadow_B() ? e_.units(rows) * lanes_.output_width[i] : 0));
        }
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const int64_t lanes = lanes_.source_width[key];
            scratch.low_rank.push_back(slots.take<uint32_t>(rows * e_.units(lanes)));
            scratch.q.push_back(slots.take<float>(rows * lanes));
            scratch.q_coef.push_back(slots.take<uint32_t>(shadow_A() ? e_.units(rows) * lanes : 0));
        }
        return scratch;
    }

    // Packs a strip of every grad_out, computes its rows of q, and packs them for the gradients of the sources.
    void strip(Scratch& scratch, int64_t s, Slots slots) {
        const int64_t from = scratch.strips.first(s), rows = scratch.strips.size(s), row = scratch.first + from;
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const int64_t lanes = lanes_.source_width[key];
            std::memset(scratch.q[key] + from * lanes, 0, 4 * rows * lanes);
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const Output& output = g_.outputs[i];
            if (output.grad_out.data == nullptr || !needs_strip(i)) continue;
            uint32_t* packed = scratch.grad_out[i] + from * e_.units(output.columns);
            e_.pack_rows(output.grad_out.at(row, 0), Keep{}, rows, output.columns, packed, rows);
            const int64_t width = round_up(lanes_.output_width[i], e_.lanes);
            if (width == 0) continue;
            auto* q = slots.take<float>(rows * width);
            low_rank_product(e_, packed, rows, lora_B_[i], width, e_.units(output.columns), q);
            for (size_t p = 0; p < g_.paths.size(); ++p) {
                const Path& path = g_.paths[p];
                if (path.output != static_cast<int>(i)) continue;
                const int64_t lanes = lanes_.source_width[path.source];
                for (int64_t r = 0; r < rows; ++r) {
                    std::memcpy(scratch.q[path.source] + (from + r) * lanes + lanes_.of_source[p],
                                q + r * width + lanes_.of_output[p], 4 * path.rows);
                }
            }
        }
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const int64_t lanes = lanes_.source_width[key];
            if (lanes == 0 || g_.sources[key].grad == nullptr) continue;
            auto* scaled = slots.take<float>(rows * lanes);
            std::memset(scaled, 0, 4 * rows * lanes);
            for (size_t p = 0; p < g_.paths.size(); ++p) {
                const Path& path = g_.paths[p];
                if (path.source != static_cast<int>(key)) continue;
                for (int64_t r = 0; r < rows; ++r) {
                    const float* q = scratch.q[key] + (from + r) * lanes + lanes_.of_source[p];
                    float* to = scaled + r * lanes + lanes_.of_source[p];
                    for (int64_t j = 0; j < path.rows; ++j) {
                        const float gate = path.gate[j];
                        to[j] = gate == 0.0f ? 0.0f : q[j] * (gate * path.scaling * g_.dropout_scale);
                    }
                }
            }
            e_.pack_rows({scaled, DType::f32, lanes}, Keep{}, rows, lanes, scratch.low_rank[key] + from * e_.units(lanes),
                         rows);
        }
    }

    // What the outer products multiply with, and the sums of q h and h^2.
    void finish(Scratch& scratch) {
        const int64_t rows = scratch.strips.rows;
        if (shadow_A()) {
            for (size_t key = 0; key < g_.sources.size(); ++key) {
                const int64_t lanes = lanes_.source_width[key];
                if (lanes > 0) e_.pack_columns({scratch.q[key], DType::f32, lanes}, rows, lanes, scratch.q_coef[key], lanes);
            }
        }
        if (!shadow_B()) return;
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            std::memset(scratch.h_coef[i], 0, 4 * e_.units(rows) * lanes_.output_width[i]);
        }
        for (size_t p = 0; p < g_.paths.size(); ++p) {
            const Path& path = g_.paths[p];
            const Matrix hidden = Matrix{g_.hidden, g_.dtype, g_.hidden_ld}.at(scratch.first, path.hidden_column);
            e_.pack_columns(hidden, rows, path.rows, scratch.h_coef[path.output] + lanes_.of_output[p],
                            lanes_.output_width[path.output]);
            if (path.stats != nullptr) sum_hidden(scratch, p, hidden);
        }
    }

    void columns(Scratch& scratch, int64_t part, int64_t parts, Slots slots) {
        const int width = e_.panel();
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const Source& source = g_.sources[key];
            const Range range = share((source.columns + width - 1) / width, part, parts);
            if (source.grad != nullptr) source_columns(scratch, key, range, slots);
            const int64_t lanes = lanes_.source_width[key];
            if (shadow_A() && lanes > 0) {
                outer(scratch.q_coef[key], lanes, source.values.at(scratch.first, 0), source.keep.at(scratch.first, 0),
                      scratch.strips.rows, source.columns, range, partial_A_[key] + scratch.block * lanes * source.columns);
            }
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const Output& output = g_.outputs[i];
            const int64_t lanes = lanes_.output_width[i];
            if (!shadow_B() || lanes == 0 || output.grad_out.data == nullptr) continue;
            const Range range = share((output.columns + width - 1) / width, part, parts);
            outer(scratch.h_coef[i], lanes, output.grad_out.at(scratch.first, 0), Keep{}, scratch.strips.rows, output.columns,
                  range, partial_B_[i] + scratch.block * lanes * output.columns);
        }
    }

private:
    bool shadow_A() const { return grads_A_ || statistics_; }
    bool shadow_B() const { return grads_B_ || statistics_; }

    // Whether the packed rows of a grad_out are used.
    bool needs_strip(size_t i) const {
        return lanes_.output_width[i] > 0 || (g_.outputs[i].has_weight && g_.sources[0].grad != nullptr);
    }

    void pack_paths() {
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const int64_t padded = round_up(g_.sources[key].columns, e_.panel());
            const bool wanted = g_.sources[key].grad != nullptr;
            lora_A_.push_back(shared_.zeroed(wanted ? padded * e_.units(lanes_.source_width[key]) : 0));
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const int64_t width = round_up(lanes_.output_width[i], e_.lanes);
            lora_B_.push_back(shared_.zeroed(width * e_.units(g_.outputs[i].columns)));
        }
        parallel_.run(g_.paths.size(), [&](int64_t p) {
            const Path& path = g_.paths[p];
            if (path.rows == 0) return;
            const Output& output = g_.outputs[path.output];
            const Source& source = g_.sources[path.source];
            e_.pack_columns(path.lora_B, output.columns, path.rows, lora_B_[path.output] + lanes_.of_output[p],
                            round_up(lanes_.output_width[path.output], e_.lanes));
            if (source.grad == nullptr) return;
            const int64_t padded = round_up(source.columns, e_.panel());
            uint32_t* panel = lora_A_[path.source];
            e_.pack_columns(path.lora_A, path.rows, source.columns, panel + lanes_.of_source[p] / e_.unit * padded, padded);
            close_lanes(e_, path, lanes_.of_source[p], panel, padded);
        });
    }

    void source_columns(Scratch& scratch, size_t key, Range range, Slots& slots) {
        const Source& source = g_.sources[key];
        const int width = e_.panel();
        const int64_t padded = round_up(source.columns, width), lane_units = e_.units(lanes_.source_width[key]);
        const bool few = g_.rows <= few_rows && key == 0 && g_.has_weights();
        float* base = slots.take<float>(few ? few_rows * width : 0);
        float* more = slots.take<float>(few ? few_rows * width : 0);
        std::vector<Segment> segments(1 + (key == 0 ? g_.outputs.size() : 0));
        for (int64_t panel = range.begin; panel < range.end; ++panel) {
            const int64_t column = panel * width, here = std::min<int64_t>(width, source.columns - column);
            for (int64_t s = 0; s < scratch.strips.count; ++s) {
                const int64_t from = scratch.strips.first(s), rows = scratch.strips.size(s), row = scratch.first + from;
                Tile tile;
                tile.segments = segments.data();
                if (lane_units > 0) {
                    segments[tile.num_segments++] = {scratch.low_rank[key] + from * lane_units, rows, lora_A_[key] + column,
                                                     padded, lane_units};
                    tile.keep = source.keep.at(row, column);
                }
                for (size_t i = 0; key == 0 && !few && i < g_.outputs.size(); ++i) {
                    const Output& output = g_.outputs[i];
                    if (!output.has_weight || output.grad_out.data == nullptr) continue;
                    const int64_t units = e_.units(output.columns);
                    segments[tile.num_segments++] = {scratch.grad_out[i] + from * units, rows, weights_[i] + column * units,
                                                     width, units};
                }
                if (few) {
                    few_base(scratch, from, rows, row, column, here, base, more);
                    tile.base = {base, DType::f32, width};
                }
                tile.rows = static_cast<int>(rows);
                tile.columns = static_cast<int>(here);
                tile.vectors = here > e_.lanes ? 2 : 1;
                tile.out = static_cast<char*>(source.grad) + (row * source.columns + column) * size_of(g_.dtype);
                tile.out_dtype = g_.dtype;
                tile.out_ld = source.columns;
                e_.tile(tile);
            }
        }
    }

    void few_base(const Scratch& scratch, int64_t from, int64_t rows, int64_t row, int64_t column, int64_t here, float* base,
                  float* more) const {
        const int width = e_.panel();
        std::memset(base, 0, 4 * rows * width);
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const Output& output = g_.outputs[i];
            if (!output.has_weight || output.grad_out.data == nullptr) continue;
            const int64_t units = e_.units(output.columns);
            if (output.weight.transposed) {
                few_along_rows(e_, output.grad_out.at(row, 0), rows, output.weight.values.at(column, 0), here, output.columns,
                               more, width);
            } else {
                few_along_columns(e_, scratch.grad_out[i] + from * units, rows, output.weight.values.at(0, column), here,
                                  output.columns, more, width);
            }
            for (int64_t r = 0; r < rows; ++r) {
                for (int64_t c = 0; c < here; ++c) base[r * width + c] += more[r * width + c];
            }
        }
    }

    void outer(const uint32_t* coef, int64_t lanes, Matrix u, Keep keep, int64_t rows, int64_t columns, Range range,
               float* out) const {
        const int64_t begin = range.begin * e_.panel(), end = std::min(range.end * e_.panel(), columns);
        if (begin >= end) return;
        Outer o;
        o.count = static_cast<int>(lanes);
        o.columns = static_cast<int>(end - begin);
        o.rows = rows;
        o.coef = coef;
        o.coef_stride = lanes;
        o.u = u.at(0, begin);
        o.keep = keep.at(0, begin);
        o.out = out + begin;
        o.out_ld = columns;
        e_.outer(o);
    }

    void sum_hidden(const Scratch& scratch, size_t p, Matrix hidden) const {
        const Path& path = g_.paths[p];
        const int64_t lanes = lanes_.source_width[path.source];
        float* sums = partial_sums_ + 2 * (scratch.block * sums_width_ + sums_first(p));
        std::memset(sums, 0, 8 * path.rows);
        float h[64];
        for (int64_t r = 0; r < scratch.strips.rows; ++r) {
            const float* q = scratch.q[path.source] + r * lanes + lanes_.of_source[p];
            for (int64_t j = 0; j < path.rows; j += 64) {
                const int64_t count = std::min<int64_t>(64, path.rows - j);
                copy_row(e_, hidden.at(r, j), count, h, DType::f32);
                for (int64_t c = 0; c < count; ++c) {
                    sums[2 * (j + c)] += h[c] * h[c];
                    sums[2 * (j + c) + 1] += q[j + c] * h[c];
                }
            }
        }
    }

    int64_t sums_first(size_t p) const {
        int64_t first = lanes_.of_output[p];
        for (int i = 0; i < g_.paths[p].output; ++i) first += lanes_.output_width[i];
        return first;
    }

    // Sums the blocks' parts in block order: row by row of lora_A, column by column of lora_B.
    void merge() {
        struct Line {
            size_t path;
            int64_t j;
        };
        std::vector<Line> lines;
        for (size_t p = 0; p < g_.paths.size(); ++p) {
            for (int64_t j = 0; j < g_.paths[p].rows; ++j) lines.push_back({p, j});
        }
        if (!shadow_A() && !shadow_B()) return;
        parallel_.run(lines.size(), [&](int64_t i) { merge_line(lines[i].path, lines[i].j); });
    }

    void merge_line(size_t p, int64_t j) {
        const Path& path = g_.paths[p];
        const Output& output = g_.outputs[path.output];
        const int64_t in = g_.sources[path.source].columns, out = output.columns, size = size_of(path.lora_A.dtype);
        Merge a, b;
        a.statistics = b.statistics = path.stats != nullptr;
        a.gate = b.gate = path.gate[j];
        if (output.grad_out.data != nullptr) a.blocks = b.blocks = blocks_.count;
        if (shadow_A()) {
            const int64_t lanes = lanes_.source_width[path.source];
            a.partials = partial_A_[path.source] + (lanes_.of_source[p] + j) * in;
            a.block_stride = lanes * in;
            a.size = in;
            a.scale = path.scaling * g_.dropout_scale;
            a.parameter = path.lora_A.at(j, 0);
            a.parameter.ld = 1;
            if (path.grad_A != nullptr) a.grad = static_cast<char*>(path.grad_A) + j * in * size;
            a.grad_ld = 1;
            e_.merge(a);
        }
        if (shadow_B()) {
            const int64_t lanes = lanes_.output_width[path.output];
            b.partials = partial_B_[path.output] + (lanes_.of_output[p] + j) * out;
            b.block_stride = lanes * out;
            b.size = out;
            b.scale = path.scaling;
            b.parameter = path.lora_B.at(0, j);
            if (path.grad_B != nullptr) b.grad = static_cast<char*>(path.grad_B) + j * size;
            b.grad_ld = path.rank;
            e_.merge(b);
        }
        if (path.stats == nullptr) return;
        float h_sq = 0, qh = 0;
        for (int64_t block = 0; block < blocks_.count; ++block) {
            const float* sums = partial_sums_ + 2 * (block * sums_width_ + sums_first(p) + j);
            h_sq += sums[0];
            qh += sums[1];
        }
        float* stats = path.stats + j * num_stats_columns;
        stats[hidden_sq] = h_sq;
        stats[grad_A_sq] = a.squares;
        stats[grad_B_sq] = b.squares;
        stats[abs_A_grad_A] = a.abs_products;
        stats[abs_B_grad_B] = b.abs_products;
        stats[gate_grad] = path.scaling * qh;
        stats[taylor_sq] = a.products_sq + b.products_sq;
    }

    Group& g_;
    const Engine& e_;
    Parallel parallel_;
    Lanes lanes_;
    Blocks blocks_;
    Slots shared_;
    bool statistics_ = false, grads_A_ = false, grads_B_ = false;
    std::vector<const uint32_t*> weights_;
    std::vector<uint32_t*> lora_A_;     // per source: [units(lanes)][columns rounded up to a panel]
    std::vector<uint32_t*> lora_B_;     // per output: [units(N)][lanes], lanes a multiple of a vector
    std::vector<float*> partial_A_;     // per source: [blocks][lanes][columns]
    std::vector<float*> partial_B_;     // per output: [blocks][lanes][N]
    float* partial_sums_ = nullptr;     // [blocks][lanes of all outputs][h^2, q h]
    int64_t sums_width_ = 0;
};

}  // namespace

int64_t packed_units(const Engine& engine, int64_t columns, int64_t depth) {
    return round_up(columns, engine.panel()) * engine.units(depth);
}

void pack_weight(const Engine& engine, const Weight& weight, int64_t out_features, int64_t in_features, bool for_forward,
                 uint32_t* out, const Parallel& parallel) {
    const int64_t columns = for_forward ? out_features : in_features, depth = for_forward ? in_features : out_features;
    const bool along_rows = for_forward != weight.transposed;
    parallel.run((columns + engine.panel() - 1) / engine.panel(),
                 [&](int64_t panel) { pack_panels(engine, weight, columns, depth, along_rows, out, panel); });
}

void forward(Group& group, const Parallel& parallel) {
    if (group.rows == 0) return;
    Forward(group, parallel).run();
}

void backward(Group& group, const Parallel& parallel) {
    Backward(group, parallel).run();
}

}  // namespace hlk
