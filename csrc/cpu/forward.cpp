// The forward of a group. A thread takes a block of rows through all stages: packs a strip of x, computes its rows of hidden
// while they are in the cache, then the outputs panel by panel, with the low-rank units in the same contraction.
#include "products.h"
#include "workspace.h"

namespace hlk {
namespace {

class Forward {
public:
    Forward(Group& group, const Parallel& parallel)
        : g_(group), e_(*group.engine), parallel_(limited(parallel, work_of(group))), lanes_(lanes_of(group)),
          blocks_(e_, group.rows, group.sources[0].columns), shared_(call_arena()), factors_(lane_factors(group, lanes_, false)),
          depth_(group.sources[0].columns), depth_units_(e_.units(depth_)),
          x_in_place_(group.rows > few_rows && e_.reads_in_place(group.sources[0].values, depth_)) {}

    void run() {
        weights_ = weight_panels(g_, true, shared_, parallel_);
        for (const Path& path : g_.paths) {
            if (g_.dropout) dropout_scales_.resize(std::max<size_t>(dropout_scales_.size(), path.rows), g_.dropout_scale);
        }
        pack_paths();
        if (few() && g_.has_weights() && g_.rows > rows_worth_lanes && g_.dtype == e_.dtype()) pack_few();
        run_blocks(*this, e_, blocks_, shared_, parallel_);
        call_arena().trim();
    }

    struct Scratch {
        int64_t block, first;            // its first row
        Strips strips, tiles;
        uint32_t* x = nullptr;           // strips of x
        std::vector<uint32_t*> low_rank; // per output: strips of s gate h
    };

    Scratch make(Slots& slots, int64_t block) {
        const int64_t size = blocks_.size(block), rows = e_.strip_rows(size);
        Scratch scratch{block, blocks_.first(block), Strips(e_, size, e_.max_rows), Strips(e_, size, e_.tile_rows), nullptr, {}};
        if (needs_x() && !x_in_place_) scratch.x = slots.take<uint32_t>(rows * depth_units_);
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            scratch.low_rank.push_back(slots.take<uint32_t>(rows * e_.units(lanes_.output_width[i])));
        }
        return scratch;
    }

    // Packs a strip of x, computes its rows of hidden, and packs them for the outputs.
    void strip(Scratch& scratch, int64_t s, Slots slots) {
        const int64_t from = scratch.strips.first(s), rows = scratch.strips.size(s), row = scratch.first + from;
        const Source& x = g_.sources[0];
        if (needs_x() && !x_in_place_) {
            e_.pack_strip(x.values.at(row, 0), Keep{}, rows, depth_, scratch.x + from * depth_units_);
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
            if (lanes_.source_width[key] == 0) continue;
            const int64_t width = e_.row_dots ? lanes_.source_width[key] : round_up(lanes_.source_width[key], e_.lanes);
            auto* h = slots.take<float>(rows * width);
            if (!e_.row_dots) {
                Left left = key == 0 && !g_.dropout ? x_rows(scratch, from) : Left{};
                if (left.data == nullptr) {
                    auto* dropped = slots.take<uint32_t>(e_.strip_rows(rows) * e_.units(source.columns));
                    e_.pack_strip(source.values.at(row, 0), source.keep.at(row, 0), rows, source.columns, dropped);
                    left = {dropped};
                }
                strip_product(e_, left, rows, lora_A_[key], width, e_.units(source.columns), h);
            }
            for (size_t p = 0; p < g_.paths.size(); ++p) {
                const Path& path = g_.paths[p];
                if (path.source != static_cast<int>(key) || path.rows == 0) continue;
                float* of_path = h + lanes_.of_source[p];
                if (e_.row_dots) {
                    e_.dot({rows, path.rows, source.columns, source.values.at(row, 0), rows_A_[p], source.keep.at(row, 0), nullptr,
                            of_path, width});
                }
                store_hidden(path, p, of_path, width, row, rows, staged[path.output]);
            }
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const int64_t width = lanes_.output_width[i];
            if (width == 0) continue;
            e_.pack_strip({staged[i], DType::f32, width}, Keep{}, rows, width, scratch.low_rank[i] + from * e_.units(width));
        }
    }

    void finish(Scratch&) {}

    void columns(Scratch& scratch, int64_t part, int64_t parts, Slots slots) {
        const int width = e_.panel();
        float* base = few() && g_.has_weights() ? slots.take<float>(few_rows * width) : nullptr;
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const Output& output = g_.outputs[i];
            const int64_t lane_units = e_.units(lanes_.output_width[i]);
            const Range range = share((output.columns + width - 1) / width, part, parts);
            for (int64_t panel = range.begin; panel < range.end; ++panel) {
                const int64_t column = panel * width;
                const int64_t here = std::min<int64_t>(width, output.columns - column);
                if (base != nullptr) few_base(scratch, output, column, here, base);
                Segment segments[2];
                Tile tile;
                tile.segments = segments;
                if (lane_units > 0) {
                    segments[tile.num_segments++] = {{}, lora_B_[i] + column * lane_units, width, lane_units};
                }
                Segment* weight = nullptr;
                if (output.has_weight && !few()) {
                    weight = &segments[tile.num_segments++];
                    *weight = {{}, weights_[i] + column * depth_units_, width, depth_units_};
                    weight->fetch_next_panel(scratch.tiles.count);
                    if (i + 1 == g_.outputs.size() && panel + 1 == range.end) {
                        blocks_.fetch(*weight, scratch.tiles.count, g_.sources[0].values, depth_, scratch.block + parallel_.threads);
                    }
                }
                tile.columns = static_cast<int>(here);
                tile.vectors = here > e_.lanes ? 2 : 1;
                if (output.bias.data != nullptr) tile.bias = output.bias.at(0, column);
                tile.out_dtype = g_.dtype;
                tile.out_ld = output.columns;
                for (int64_t s = 0; s < scratch.tiles.count; ++s) {
                    const int64_t from = scratch.tiles.first(s), row = scratch.first + from;
                    if (lane_units > 0) segments[0].a = {scratch.low_rank[i] + from * lane_units};
                    if (weight != nullptr) {
                        weight->a = x_rows(scratch, from);
                        if (s > 0) weight->next += weight->next_step * depth_units_;
                    } else if (output.has_weight) {
                        tile.base = {base + from * width, DType::f32, width};
                    } else {
                        tile.base = output.base.at(row, column);
                    }
                    tile.rows = static_cast<int>(scratch.tiles.size(s));
                    tile.out = static_cast<char*>(output.out) + (row * output.columns + column) * size_of(g_.dtype);
                    e_.tile(tile);
                }
            }
        }
    }

    void done(int64_t) {}

private:
    bool few() const { return g_.rows <= few_rows; }

    // Rows of x from row `from` of the block on; no data where x was not packed.
    Left x_rows(const Scratch& scratch, int64_t from) const {
        if (x_in_place_) return in_place(g_.sources[0].values.at(scratch.first + from, 0));
        if (scratch.x == nullptr) return {};
        return {scratch.x + from * depth_units_};
    }

    // The rows of x as lanes of vectors: one read of a unit of the weight, which lies in units, then serves all of them.
    void pack_few() {
        const int64_t lanes = round_up(g_.rows, e_.lanes);
        uint32_t* panel = shared_.zeroed(lanes * depth_units_);
        e_.pack_rows(g_.sources[0].values, g_.rows, depth_, panel, lanes);
        few_x_ = panel;
    }

    // The base product of few rows, a block of its own, for some columns.
    void few_base(const Scratch& scratch, const Output& output, int64_t column, int64_t here, float* base) const {
        const int width = e_.panel();
        const Weight& weight = output.weight;
        if (!weight.transposed) {
            e_.dot({g_.rows, here, depth_, g_.sources[0].values, weight.values.at(column, 0), Keep{}, few_x_, base, width});
            return;
        }
        for (int64_t s = 0; s < scratch.strips.count; ++s) {
            const int64_t from = scratch.strips.first(s);
            few_along_columns(e_, scratch.x + from * depth_units_, scratch.strips.size(s), weight.values.at(0, column), here, depth_,
                              base + from * width, width);
        }
    }

    // Whether strips of x are read: by the base, or by the tiles of the low-rank part.
    bool needs_x() const {
        const bool transposed = std::any_of(g_.outputs.begin(), g_.outputs.end(), [](const Output& o) { return o.weight.transposed; });
        return (g_.has_weights() && (!few() || transposed)) || (!e_.row_dots && lanes_.source_width[0] > 0 && !g_.dropout);
    }

    void pack_paths() {
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const int64_t width = e_.row_dots ? 0 : round_up(lanes_.source_width[key], e_.lanes);
            lora_A_.push_back(shared_.zeroed(width * e_.units(g_.sources[key].columns)));
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const int64_t padded = round_up(g_.outputs[i].columns, e_.panel());
            lora_B_.push_back(shared_.zeroed(padded * e_.units(lanes_.output_width[i])));
        }
        for (const Path& path : g_.paths) {
            rows_A_.push_back(path.lora_A);
            if (!e_.row_dots || path.lora_A.dtype == e_.dtype()) continue;
            const Source& source = g_.sources[path.source];
            if (path.lora_A.dtype == source.values.dtype && !g_.dropout) continue;
            rows_A_.back() = {shared_.take<float>(path.rows * source.columns), e_.dtype(), source.columns};
        }
        parallel_.run(g_.paths.size(), [&](int64_t p) {
            const Path& path = g_.paths[p];
            if (path.rows == 0) return;
            const Source& source = g_.sources[path.source];
            if (!e_.row_dots) {
                e_.pack_rows(path.lora_A, path.rows, source.columns, lora_A_[path.source] + lanes_.of_source[p],
                             round_up(lanes_.source_width[path.source], e_.lanes));
            } else if (rows_A_[p].data != path.lora_A.data) {
                e_.convert({path.rows, source.columns, path.lora_A, nullptr, const_cast<void*>(rows_A_[p].data), e_.dtype(), source.columns});
            }
            pack_path(e_, path, path.lora_B, true, g_.outputs[path.output].columns, lanes_.of_output[p],
                      lanes_.output_width[path.output], lora_B_[path.output]);
        });
    }

    void draw_keep(const Source& source, size_t key, int64_t row, int64_t rows) const {
        for (int64_t i = 0; i < rows; ++i) {
            e_.keep_bits(g_.dropout_key, static_cast<uint32_t>(row + i), static_cast<uint32_t>(key), source.columns,
                         g_.dropout_threshold, source.keep_out + (row + i) * source.keep.ld);
        }
    }

    // Rows of a path's h, before dropout's scale: into hidden, and with scale and gate into the output's low-rank rows.
    void store_hidden(const Path& path, size_t p, const float* h, int64_t width, int64_t row, int64_t rows, float* staged) const {
        const int64_t lane = lanes_.of_output[p];
        const Matrix from{h, DType::f32, width};
        e_.convert({rows, path.rows, from, factors_[path.output].data() + lane, staged + lane, DType::f32, lanes_.output_width[path.output]});
        if (g_.hidden == nullptr) return;
        e_.convert({rows, path.rows, from, g_.dropout ? dropout_scales_.data() : nullptr,
                    static_cast<char*>(g_.hidden) + (row * g_.hidden_ld + path.hidden_column) * size_of(g_.dtype), g_.dtype, g_.hidden_ld});
    }

    Group& g_;
    const Engine& e_;
    Parallel parallel_;
    Lanes lanes_;
    Blocks blocks_;
    Slots shared_;
    const uint32_t* few_x_ = nullptr; // [units(K)][rows in whole vectors]
    std::vector<const uint32_t*> weights_;
    std::vector<std::vector<float>> factors_;   // per output: what its low-rank rows are multiplied by
    std::vector<float> dropout_scales_;   // one per row of the longest path
    int64_t depth_, depth_units_;     // of the base's contraction
    bool x_in_place_;
    std::vector<Matrix> rows_A_;      // per path: lora_A, in a dtype that can be multiplied with the source's
    std::vector<uint32_t*> lora_A_;   // per source, for tiles: [units(columns)][lanes], lanes a multiple of a vector
    std::vector<uint32_t*> lora_B_;   // per output: panels of N columns over its lanes
};

}  // namespace

void forward(Group& group, const Parallel& parallel) {
    if (group.rows == 0) return;
    Forward(group, parallel).run();
}

}  // namespace hlk
