// The backward of a group. A thread takes a block of rows through all stages: packs a strip of every grad_out, computes its
// rows of q, then the gradients of the sources panel by panel, and the block's parts of grad_A, grad_B and the statistics.
#include <optional>

#include "block_sums.h"
#include "products.h"

namespace hlk {

const char* const stats_columns[num_stats_columns] = {"hidden_sq", "grad_A_sq", "grad_B_sq", "abs_A_grad_A",
                                                      "abs_B_grad_B", "gate_grad", "taylor_sq"};

namespace {

// Of the sums of all blocks, as many as there are with a thread for each; more is avoided by larger blocks.
constexpr int64_t most_partial_bytes = 128 << 20;

class Backward {
public:
    Backward(Group& group, const Parallel& parallel)
        : g_(group), e_(*group.engine), parallel_(limited(parallel, 2 * work_of(group))), lanes_(lanes_of(group)),
          blocks_(e_, group.rows, depth_of(group)), shared_(call_arena()), factors_(lane_factors(group, lanes_, true)) {
        for (size_t p = 0; p < g_.paths.size(); ++p) {
            const Path& path = g_.paths[p];
            statistics_ = statistics_ || path.stats != nullptr;
            grads_A_ = grads_A_ || path.grad_A != nullptr;
            grads_B_ = grads_B_ || path.grad_B != nullptr;
        }
        for (const Output& output : g_.outputs) {
            units_.push_back(e_.units(output.columns));
            in_place_.push_back(g_.rows > few_rows && e_.reads_in_place(output.grad_out, output.columns));
        }
        int64_t floats = 0;
        for (size_t key = 0; key < g_.sources.size(); ++key) floats += lanes_.source_width[key] * g_.sources[key].columns;
        for (size_t i = 0; i < g_.outputs.size(); ++i) floats += lanes_.output_width[i] * g_.outputs[i].columns;
        while (blocks_.count > 8 && 4 * blocks_.count * floats > most_partial_bytes) blocks_.count /= 2;
    }

    void run() {
        if (g_.sources[0].grad != nullptr) weights_ = weight_panels(g_, false, shared_, parallel_);
        pack_paths();
        int64_t width = 0;
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            first_A_.push_back(sums_floats_);
            sums_floats_ += shadow_A() ? lanes_.source_width[key] * g_.sources[key].columns : 0;
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            first_B_.push_back(sums_floats_);
            sums_floats_ += shadow_B() ? lanes_.output_width[i] * g_.outputs[i].columns : 0;
            width += lanes_.output_width[i];
        }
        first_sums_ = sums_floats_;
        sums_floats_ += statistics_ ? 2 * width : 0;
        products_sq_ = shared_.take<float>(statistics_ ? 2 * width : 0);
        find_pieces();
        sums_.emplace(e_, shared_, blocks_.count, sums_floats_, first_sums_);
        run_blocks(*this, e_, blocks_, shared_, parallel_);
        merge();
        call_arena().trim();
    }

    struct Scratch {
        int64_t block, first;              // its first row
        float* part;                       // its sums
        Strips strips, tiles;
        std::vector<uint32_t*> grad_out;   // per output: strips of grad_out
        std::vector<uint32_t*> low_rank;   // per source: strips of s gate q
        std::vector<float*> q;             // per source: [rows of the block][lanes]
        std::vector<uint32_t*> q_coef;     // per source: coefficients from q
        std::vector<uint32_t*> h_coef;     // per output: coefficients from h
    };

    Scratch make(Slots& slots, int64_t block) {
        const int64_t size = blocks_.size(block), rows = e_.strip_rows(size);
        Scratch scratch{block, blocks_.first(block), sums_->take(block), Strips(e_, size, e_.max_rows), Strips(e_, size, e_.tile_rows),
                        {}, {}, {}, {}, {}};
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const bool packed = g_.outputs[i].grad_out.data != nullptr && needs_strip(i) && !in_place_[i];
            scratch.grad_out.push_back(slots.take<uint32_t>(packed ? rows * units_[i] : 0));
            scratch.h_coef.push_back(slots.zeroed(shadow_B() ? e_.coefficient_units(size, lanes_.output_width[i]) : 0));
        }
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const int64_t lanes = lanes_.source_width[key];
            scratch.low_rank.push_back(slots.take<uint32_t>(rows * e_.units(lanes)));
            scratch.q.push_back(slots.take<float>(size * lanes));
            scratch.q_coef.push_back(slots.zeroed(shadow_A() ? e_.coefficient_units(size, lanes) : 0));
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
            if (output.grad_out.data == nullptr) continue;
            if (needs_strip(i) && !in_place_[i]) {
                e_.pack_strip(output.grad_out.at(row, 0), Keep{}, rows, output.columns,
                              scratch.grad_out[i] + from * units_[i]);
            }
            const int64_t units = units_[i], width = round_up(lanes_.output_width[i], e_.lanes);
            float* q = nullptr;
            if (!e_.row_dots && width > 0) {
                q = slots.take<float>(rows * width);
                strip_product(e_, grad_rows(scratch, i, from), rows, lora_B_[i], width, units, q);
            }
            for (size_t p = 0; p < g_.paths.size(); ++p) {
                const Path& path = g_.paths[p];
                if (path.output != static_cast<int>(i) || path.rows == 0) continue;
                const int64_t lanes = lanes_.source_width[path.source];
                float* to = scratch.q[path.source] + from * lanes + lanes_.of_source[p];
                if (e_.row_dots) {
                    e_.dot({rows, path.rows, output.columns, output.grad_out.at(row, 0),
                            {lora_B_[i] + lanes_.of_output[p] * units, e_.dtype(), units * e_.unit}, Keep{}, nullptr, to, lanes});
                    continue;
                }
                for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * lanes, q + r * width + lanes_.of_output[p], 4 * path.rows);
            }
        }
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const int64_t lanes = lanes_.source_width[key];
            if (lanes == 0 || g_.sources[key].grad == nullptr) continue;
            auto* scaled = slots.take<float>(rows * lanes);
            e_.convert({rows, lanes, {scratch.q[key] + from * lanes, DType::f32, lanes}, factors_[key].data(), scaled, DType::f32, lanes});
            e_.pack_strip({scaled, DType::f32, lanes}, Keep{}, rows, lanes, scratch.low_rank[key] + from * e_.units(lanes));
        }
    }

    // What the outer products multiply with, the sums of q h and h^2, and the pieces of the base's gradient.
    void finish(Scratch& scratch) {
        const int64_t rows = scratch.strips.rows;
        sum_pieces(scratch);
        if (shadow_A()) {
            for (size_t key = 0; key < g_.sources.size(); ++key) {
                const int64_t lanes = lanes_.source_width[key];
                if (lanes == 0) continue;
                e_.pack_coefficients({scratch.q[key], DType::f32, lanes}, rows, 0, lanes, scratch.q_coef[key], lanes);
            }
        }
        if (!shadow_B()) return;
        for (size_t p = 0; p < g_.paths.size(); ++p) {
            const Path& path = g_.paths[p];
            const Matrix hidden = Matrix{g_.hidden, g_.dtype, g_.hidden_ld}.at(scratch.first, path.hidden_column);
            e_.pack_coefficients(hidden, rows, lanes_.of_output[p], path.rows, scratch.h_coef[path.output],
                                 lanes_.output_width[path.output]);
            if (path.stats != nullptr) sum_hidden(scratch, p, hidden);
        }
    }

    void columns(Scratch& scratch, int64_t part, int64_t parts, Slots slots) {
        const int width = e_.panel();
        // The outer products with grad_out first: its rows are still in the cache, which the weights would push out.
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const Output& output = g_.outputs[i];
            const int64_t lanes = lanes_.output_width[i];
            if (!shadow_B() || lanes == 0) continue;
            const Range range = share((output.columns + width - 1) / width, part, parts);
            outer(scratch.h_coef[i], lanes, output.grad_out.at(scratch.first, 0), Keep{}, scratch.strips.rows, output.columns,
                  range, scratch.part + first_B_[i]);
        }
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const Source& source = g_.sources[key];
            const Range range = share((source.columns + width - 1) / width, part, parts);
            if (source.grad != nullptr) source_columns(scratch, key, range, slots);
            outer_A(scratch, key, range);
        }
    }

    void done(int64_t block) { sums_->done(block); }

private:
    // Of the strips that a block keeps.
    static int64_t depth_of(const Group& g) {
        int64_t depth = 0;
        for (const Output& output : g.outputs) depth += output.grad_out.data != nullptr ? output.columns : 0;
        return depth;
    }

    bool shadow_A() const { return grads_A_ || statistics_; }
    bool shadow_B() const { return grads_B_ || statistics_; }

    // Rows of a grad_out from row `from` of the block on.
    Left grad_rows(const Scratch& scratch, size_t i, int64_t from) const {
        if (in_place_[i]) return in_place(g_.outputs[i].grad_out.at(scratch.first + from, 0));
        return {scratch.grad_out[i] + from * units_[i]};
    }

    // Whether the packed rows of a grad_out are used.
    bool needs_strip(size_t i) const {
        return (!e_.row_dots && lanes_.output_width[i] > 0) || (g_.outputs[i].has_weight && g_.sources[0].grad != nullptr);
    }

    void pack_paths() {
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const int64_t padded = round_up(g_.sources[key].columns, e_.panel());
            const bool wanted = g_.sources[key].grad != nullptr;
            lora_A_.push_back(shared_.zeroed(wanted ? padded * e_.units(lanes_.source_width[key]) : 0));
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const int64_t width = e_.row_dots ? lanes_.output_width[i] : round_up(lanes_.output_width[i], e_.lanes);
            lora_B_.push_back(shared_.zeroed(width * e_.units(g_.outputs[i].columns)));
        }
        parallel_.run(g_.paths.size(), [&](int64_t p) {
            const Path& path = g_.paths[p];
            if (path.rows == 0) return;
            const Output& output = g_.outputs[path.output];
            const Source& source = g_.sources[path.source];
            const int64_t units = e_.units(output.columns), lane = lanes_.of_output[p];
            if (e_.row_dots) {
                e_.pack_transposed(path.lora_B, output.columns, path.rows, lora_B_[path.output] + lane * units, units);
            } else {
                e_.pack_columns(path.lora_B, output.columns, path.rows, lora_B_[path.output] + lane,
                                round_up(lanes_.output_width[path.output], e_.lanes));
            }
            if (source.grad == nullptr) return;
            pack_path(e_, path, path.lora_A, false, source.columns, lanes_.of_source[p], lanes_.source_width[path.source],
                      lora_A_[path.source]);
        });
    }

    void source_columns(Scratch& scratch, size_t key, Range range, Slots& slots) {
        const Source& source = g_.sources[key];
        const int width = e_.panel();
        const int64_t lane_units = e_.units(lanes_.source_width[key]);
        const bool few = g_.rows <= few_rows && key == 0 && g_.has_weights();
        const int64_t base_ld = (range.end - range.begin) * width;
        float* base = slots.take<float>(few ? few_rows * base_ld : 0);
        if (few && base_ld > 0) few_base(scratch, range.begin * width, std::min(range.end * width, source.columns), base, base_ld, slots);
        std::vector<Segment> segments(1 + (key == 0 ? g_.outputs.size() : 0));
        for (int64_t panel = range.begin; panel < range.end; ++panel) {
            const int64_t column = panel * width, here = std::min<int64_t>(width, source.columns - column);
            Tile tile;
            tile.segments = segments.data();
            if (lane_units > 0) {
                segments[tile.num_segments++] = {{}, lora_A_[key] + column * lane_units, width, lane_units};
            }
            bool fetches_x = false;
            for (size_t i = 0; key == 0 && !few && i < g_.outputs.size(); ++i) {
                if (!contributes(i)) continue;
                Segment& segment = segments[tile.num_segments++];
                segment = {{}, weights_[i] + column * units_[i], width, units_[i]};
                segment.fetch_next_panel(scratch.tiles.count);
                // What comes after the tiles: the block's rows of x, by the first of the weights, then the next block's of grad_out.
                if (panel + 2 == range.end && !fetches_x) {
                    fetches_x = true;
                    blocks_.fetch(segment, scratch.tiles.count, source.values, source.columns, scratch.block);
                }
                if (panel + 1 == range.end) {
                    const Output& output = g_.outputs[i];
                    blocks_.fetch(segment, scratch.tiles.count, output.grad_out, output.columns, scratch.block + parallel_.threads);
                }
            }
            tile.columns = static_cast<int>(here);
            tile.vectors = here > e_.lanes ? 2 : 1;
            tile.out_dtype = g_.dtype;
            tile.out_ld = source.columns;
            for (int64_t s = 0; s < scratch.tiles.count; ++s) {
                const int64_t from = scratch.tiles.first(s), row = scratch.first + from;
                Segment* segment = segments.data();
                if (lane_units > 0) {
                    (segment++)->a = {scratch.low_rank[key] + from * lane_units};
                    tile.keep = source.keep.at(row, column);
                }
                for (size_t i = 0; key == 0 && !few && i < g_.outputs.size(); ++i) {
                    if (!contributes(i)) continue;
                    segment->a = grad_rows(scratch, i, from);
                    if (s > 0) segment->next += segment->next_step * segment->units;
                    ++segment;
                }
                if (few) tile.base = {base + from * base_ld + column - range.begin * width, DType::f32, base_ld};
                tile.rows = static_cast<int>(scratch.tiles.size(s));
                tile.out = static_cast<char*>(source.grad) + (row * source.columns + column) * size_of(g_.dtype);
                e_.tile(tile);
            }
        }
    }

    void outer_A(const Scratch& scratch, size_t key, Range range) const {
        const Source& source = g_.sources[key];
        const int64_t lanes = lanes_.source_width[key];
        if (!shadow_A() || lanes == 0) return;
        outer(scratch.q_coef[key], lanes, source.values.at(scratch.first, 0), source.keep.at(scratch.first, 0), scratch.strips.rows,
              source.columns, range, scratch.part + first_A_[key]);
    }

    // Whether an output's grad_out times its weight is part of the gradient of x.
    bool contributes(size_t i) const { return g_.outputs[i].has_weight && g_.outputs[i].grad_out.data != nullptr; }

    // Of up to `rows_worth_lanes` rows, reading the weight is all there is to do: whole rows of it one after the other, shared out
    // among the threads by pieces of as many rows, which depend on the sizes alone.
    struct Piece {
        size_t output;
        int64_t begin, end;
    };

    bool sums_pieces() const { return g_.rows <= rows_worth_lanes && g_.sources[0].grad != nullptr && g_.has_weights(); }

    void find_pieces() {
        constexpr int64_t least = 128, most = 16;
        for (size_t i = 0; sums_pieces() && i < g_.outputs.size(); ++i) {
            const Output& output = g_.outputs[i];
            if (output.grad_out.data == nullptr || output.weight.transposed) continue;
            const int64_t apart = std::max(least, round_up((output.columns + most - 1) / most, 2));
            for (int64_t row = 0; row < output.columns; row += apart) {
                pieces_.push_back({i, row, std::min(row + apart, output.columns)});
            }
        }
        piece_sums_ = shared_.take<float>(static_cast<int64_t>(pieces_.size()) * g_.rows * g_.sources[0].columns);
    }

    void sum_pieces(const Scratch& scratch) {
        const int64_t columns = g_.sources[0].columns;
        parallel_.run(pieces_.size(), [&](int64_t n) {
            EngineScope scope(e_);
            const Piece& piece = pieces_[n];
            few_along_columns(e_, scratch.grad_out[piece.output] + piece.begin / e_.unit * g_.rows, g_.rows,
                              g_.outputs[piece.output].weight.values.at(piece.begin, 0), columns, piece.end - piece.begin,
                              piece_sums_ + n * g_.rows * columns, columns);
        });
    }

    // The base's gradient of few rows, a block of its own, for columns begin ... end - 1.
    void few_base(const Scratch& scratch, int64_t begin, int64_t end, float* base, int64_t ld, Slots& slots) const {
        // So many rows of a weight stay in the cache while one strip after the other reads them.
        constexpr int64_t piece = 128;
        const int64_t columns = end - begin;
        float* more = nullptr;
        std::memset(base, 0, 4 * g_.rows * ld);
        for (size_t n = 0; n < pieces_.size(); ++n) {
            for (int64_t r = 0; r < g_.rows; ++r) {
                const float* from = piece_sums_ + (n * g_.rows + r) * g_.sources[0].columns + begin;
                for (int64_t c = 0; c < columns; ++c) base[r * ld + c] += from[c];
            }
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const Output& output = g_.outputs[i];
            if (!output.has_weight || output.grad_out.data == nullptr) continue;
            const int64_t units = e_.units(output.columns);
            if (output.weight.transposed) {
                if (more == nullptr) more = slots.take<float>(g_.rows * columns);
                e_.dot({g_.rows, columns, output.columns, output.grad_out.at(scratch.first, 0), output.weight.values.at(begin, 0), Keep{},
                        nullptr, more, columns});
                for (int64_t r = 0; r < g_.rows; ++r) {
                    for (int64_t c = 0; c < columns; ++c) base[r * ld + c] += more[r * columns + c];
                }
                continue;
            }
            for (int64_t row = 0; row < output.columns && !sums_pieces(); row += piece) {
                for (int64_t s = 0; s < scratch.strips.count; ++s) {
                    const int64_t from = scratch.strips.first(s), rows = scratch.strips.size(s);
                    few_along_columns(e_, scratch.grad_out[i] + from * units + row / e_.unit * rows, rows,
                                      output.weight.values.at(row, begin), columns, std::min(piece, output.columns - row),
                                      base + from * ld, ld, true);
                }
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
        o.lanes = lanes;
        o.u = u.at(0, begin);
        o.keep = keep.at(0, begin);
        o.out = out + begin;
        o.out_ld = columns;
        e_.outer(o);
    }

    void sum_hidden(const Scratch& scratch, size_t p, Matrix hidden) const {
        const Path& path = g_.paths[p];
        const int64_t lanes = lanes_.source_width[path.source];
        float* h_sq = scratch.part + first_sums_ + 2 * sums_first(p);
        e_.moments({scratch.strips.rows, path.rows, hidden, scratch.q[path.source] + lanes_.of_source[p], lanes, h_sq, h_sq + path.rows});
    }

    int64_t sums_first(size_t p) const {
        int64_t first = lanes_.of_output[p];
        for (int i = 0; i < g_.paths[p].output; ++i) first += lanes_.output_width[i];
        return first;
    }

    // Row by row of lora_A, and the columns of lora_B as many at a time as a vector has lanes.
    void merge() {
        struct Part {
            size_t path;
            int64_t first, count;   // count 0: one row of lora_A
        };
        std::vector<Part> parts;
        for (size_t p = 0; p < g_.paths.size(); ++p) {
            const int64_t rows = g_.paths[p].rows;
            for (int64_t j = 0; shadow_A() && j < rows; ++j) parts.push_back({p, j, 0});
            for (int64_t j = 0; shadow_B() && j < rows; j += e_.lanes) parts.push_back({p, j, std::min<int64_t>(e_.lanes, rows - j)});
        }
        parallel_.run(parts.size(), [&](int64_t i) {
            const Part& part = parts[i];
            part.count == 0 ? merge_row(part.path, part.first) : merge_columns(part.path, part.first, part.count);
        });
        for (size_t p = 0; p < g_.paths.size(); ++p) {
            if (g_.paths[p].stats != nullptr) finish_statistics(p);
        }
    }

    // The squares of products go to where those of lora_B are added.
    void merge_row(size_t p, int64_t j) {
        const Path& path = g_.paths[p];
        const int64_t in = g_.sources[path.source].columns;
        Merge m;
        m.sums = sums_->all() + first_A_[path.source] + (lanes_.of_source[p] + j) * in;
        m.size = in;
        m.scale = path.scaling * g_.dropout_scale;
        m.gate = path.gate[j];
        m.parameter = path.lora_A.at(j, 0);
        if (path.grad_A != nullptr) m.grad = static_cast<char*>(path.grad_A) + j * in * size_of(path.lora_A.dtype);
        m.statistics = path.stats != nullptr;
        e_.merge(m);
        if (path.stats == nullptr) return;
        float* stats = path.stats + j * num_stats_columns;
        stats[grad_A_sq] = m.squares;
        stats[abs_A_grad_A] = m.abs_products;
        products_sq_[2 * (sums_first(p) + j)] = m.products_sq;
    }

    void merge_columns(size_t p, int64_t first, int64_t count) {
        const Path& path = g_.paths[p];
        const int64_t out = g_.outputs[path.output].columns;
        MergeColumns m;
        m.sums = sums_->all() + first_B_[path.output] + (lanes_.of_output[p] + first) * out;
        m.size = out;
        m.count = static_cast<int>(count);
        m.scale = path.scaling;
        m.gate = path.gate + first;
        m.parameter = path.lora_B.at(0, first);
        if (path.grad_B != nullptr) m.grad = static_cast<char*>(path.grad_B) + first * size_of(path.lora_B.dtype);
        m.grad_ld = path.rank;
        m.statistics = path.stats != nullptr;
        float sums[3][max_lanes];
        m.squares = sums[0];
        m.abs_products = sums[1];
        m.products_sq = sums[2];
        e_.merge_columns(m);
        for (int64_t j = 0; path.stats != nullptr && j < count; ++j) {
            float* stats = path.stats + (first + j) * num_stats_columns;
            stats[grad_B_sq] = sums[0][j];
            stats[abs_B_grad_B] = sums[1][j];
            products_sq_[2 * (sums_first(p) + first + j) + 1] = sums[2][j];
        }
    }

    void finish_statistics(size_t p) {
        const Path& path = g_.paths[p];
        for (int64_t j = 0; j < path.rows; ++j) {
            const float* sums = sums_->all() + first_sums_ + 2 * sums_first(p) + j;
            float* stats = path.stats + j * num_stats_columns;
            const float* products_sq = products_sq_ + 2 * (sums_first(p) + j);
            stats[hidden_sq] = sums[0];
            stats[gate_grad] = path.scaling * sums[path.rows];
            stats[taylor_sq] = products_sq[0] + products_sq[1];
        }
    }

    Group& g_;
    const Engine& e_;
    Parallel parallel_;
    Lanes lanes_;
    Blocks blocks_;
    Slots shared_;
    bool statistics_ = false, grads_A_ = false, grads_B_ = false;
    std::vector<int64_t> units_;        // per output: of its columns
    std::vector<char> in_place_;        // per output: whether its grad_out is read where it lies
    std::vector<std::vector<float>> factors_;   // per source: what its low-rank rows are multiplied by
    std::vector<const uint32_t*> weights_;
    std::vector<uint32_t*> lora_A_;     // per source: panels of its columns over its lanes
    std::vector<uint32_t*> lora_B_;     // per output: [lanes][units(N)], for tiles [units(N)][lanes], lanes a multiple of a vector
    // The sums of a block: per source [lanes][columns], per output [lanes][N], and of each path [h^2, q h][rows].
    std::vector<int64_t> first_A_, first_B_;
    int64_t first_sums_ = 0, sums_floats_ = 0;
    std::optional<BlockSums> sums_;
    float* products_sq_ = nullptr;      // per path and row: those of lora_A and of lora_B
    std::vector<Piece> pieces_;
    float* piece_sums_ = nullptr;       // [pieces][rows][K]
};

}  // namespace

void backward(Group& group, const Parallel& parallel) { Backward(group, parallel).run(); }

}  // namespace hlk
