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
          blocks_(e_, group.rows, group.sources[0].columns), shared_(call_arena()) {}

    void run() {
        weights_ = weight_panels(g_, true, shared_, parallel_);
        pack_paths();
        if (few() && g_.has_weights() && g_.rows > rows_worth_lanes) pack_few();
        run_blocks(*this, e_, blocks_, shared_, parallel_);
        call_arena().trim();
    }

    struct Scratch {
        int64_t first;                   // row of the block
        Strips strips, tiles;
        uint32_t* x = nullptr;           // strips of x
        std::vector<uint32_t*> low_rank; // per output: strips of s gate h
    };

    Scratch make(Slots& slots, int64_t block) {
        const int64_t size = blocks_.size(block), rows = e_.strip_rows(size);
        Scratch scratch{blocks_.first(block), Strips(e_, size, e_.max_rows), Strips(e_, size, e_.tile_rows), nullptr, {}};
        if (needs_x() && !x_in_place()) scratch.x = slots.take<uint32_t>(rows * e_.units(g_.sources[0].columns));
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            scratch.low_rank.push_back(slots.take<uint32_t>(rows * e_.units(lanes_.output_width[i])));
        }
        return scratch;
    }

    // Packs a strip of x, computes its rows of hidden, and packs them for the outputs.
    void strip(Scratch& scratch, int64_t s, Slots slots) {
        const int64_t from = scratch.strips.first(s), rows = scratch.strips.size(s), row = scratch.first + from;
        const Source& x = g_.sources[0];
        if (needs_x() && !x_in_place()) {
            e_.pack_strip(x.values.at(row, 0), Keep{}, rows, x.columns, scratch.x + from * e_.units(x.columns));
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
            if (dots_A()) {
                auto* h = slots.take<float>(rows * width);
                for (size_t p = 0; p < g_.paths.size(); ++p) {
                    const Path& path = g_.paths[p];
                    if (path.source != static_cast<int>(key)) continue;
                    few_along_rows(e_, source.values.at(row, 0), nullptr, rows, path.lora_A, path.rows, source.columns,
                                   h + lanes_.of_source[p], width);
                    store_hidden(path, p, h, width, row, rows, staged[path.output]);
                }
                continue;
            }
            Left left = key == 0 ? x_rows(scratch, from) : Left{};
            if (key != 0 && in_place_for_hidden(key)) {
                left = in_place(source.values.at(row, 0));
            } else if (key != 0 || g_.dropout || left.data == nullptr) {
                auto* dropped = slots.take<uint32_t>(e_.strip_rows(rows) * e_.units(source.columns));
                e_.pack_strip(source.values.at(row, 0), source.keep.at(row, 0), rows, source.columns, dropped);
                left = {dropped};
            }
            auto* h = slots.take<float>(rows * width);
            low_rank_product(e_, left, rows, lora_A_[key], lanes_.source_width[key], e_.units(source.columns), h);
            for (size_t p = 0; p < g_.paths.size(); ++p) {
                const Path& path = g_.paths[p];
                if (path.source != static_cast<int>(key)) continue;
                store_hidden(path, p, h, width, row, rows, staged[path.output]);
            }
        }
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const int64_t width = lanes_.output_width[i];
            if (width == 0) continue;
            e_.pack_strip({staged[i], DType::f32, width}, Keep{}, rows, width, scratch.low_rank[i] + from * e_.units(width));
        }
    }

    void finish(Scratch&, Slots) {}

    void columns(Scratch& scratch, int64_t part, int64_t parts, Slots slots) {
        const int width = e_.panel();
        float* base = few() && g_.has_weights() ? slots.take<float>(few_rows * width) : nullptr;
        for (size_t i = 0; i < g_.outputs.size(); ++i) {
            const Output& output = g_.outputs[i];
            const int64_t depth = g_.sources[0].columns, lane_units = e_.units(lanes_.output_width[i]);
            const Range range = share((output.columns + width - 1) / width, part, parts);
            for (int64_t panel = range.begin; panel < range.end; ++panel) {
                const int64_t column = panel * width;
                const int64_t here = std::min<int64_t>(width, output.columns - column);
                if (base != nullptr) few_base(scratch, output, column, here, base);
                for (int64_t s = 0; s < scratch.tiles.count; ++s) {
                    const int64_t from = scratch.tiles.first(s), rows = scratch.tiles.size(s), row = scratch.first + from;
                    Segment segments[2];
                    Tile tile;
                    tile.segments = segments;
                    if (lane_units > 0) {
                        segments[tile.num_segments++] = {{scratch.low_rank[i] + from * lane_units},
                                                         lora_B_[i] + column * lane_units, width, lane_units};
                    }
                    if (output.has_weight && !few()) {
                        segments[tile.num_segments++] = {x_rows(scratch, from),
                                                         weights_[i] + column * e_.units(depth), width, e_.units(depth)};
                    } else if (output.has_weight) {
                        tile.base = {base + from * width, DType::f32, width};
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
    bool few() const { return g_.rows <= few_rows; }

    bool x_in_place() const {
        return g_.rows > few_rows && (g_.has_weights() || !g_.dropout) && e_.reads_in_place(g_.sources[0].values, g_.sources[0].columns);
    }

    // Whether hidden is computed from a source's rows as they lie.
    bool in_place_for_hidden(size_t key) const {
        if (g_.dropout) return false;
        return key == 0 ? x_in_place() : e_.reads_in_place(g_.sources[key].values, g_.sources[key].columns);
    }

    // Rows of x from row `from` of the block on; no data where x was not packed.
    Left x_rows(const Scratch& scratch, int64_t from) const {
        if (x_in_place()) return in_place(g_.sources[0].values.at(scratch.first + from, 0));
        if (scratch.x == nullptr) return {};
        return {scratch.x + from * e_.units(g_.sources[0].columns)};
    }

    // The rows of x as lanes of vectors: one read of a unit of the weight then serves all of them.
    void pack_few() {
        const int64_t depth = g_.sources[0].columns, lanes = round_up(g_.rows, e_.lanes);
        uint32_t* panel = shared_.zeroed(lanes * e_.units(depth));
        e_.pack_rows(g_.sources[0].values, g_.rows, depth, panel, lanes);
        few_x_ = panel;
    }

    // The base product of few rows, a block of its own, for some columns.
    void few_base(const Scratch& scratch, const Output& output, int64_t column, int64_t here, float* base) const {
        const int64_t depth = g_.sources[0].columns, units = e_.units(depth);
        const int width = e_.panel();
        const Weight& weight = output.weight;
        if (!weight.transposed) {
            few_along_rows(e_, g_.sources[0].values, few_x_, g_.rows, weight.values.at(column, 0), here, depth, base, width);
            return;
        }
        for (int64_t s = 0; s < scratch.strips.count; ++s) {
            const int64_t from = scratch.strips.first(s);
            few_along_columns(e_, scratch.x + from * units, scratch.strips.size(s), weight.values.at(0, column), here, depth,
                              base + from * width, width);
        }
    }

    // Whether lora_A is read where it lies: for few rows packing it costs more than the product.
    bool dots_A() const { return few() && !g_.dropout; }

    bool needs_x() const {
        if (dots_A()) return std::any_of(g_.outputs.begin(), g_.outputs.end(), [](const Output& o) { return o.weight.transposed; });
        return g_.has_weights() || (lanes_.source_width[0] > 0 && !g_.dropout);
    }

    void pack_paths() {
        for (size_t key = 0; key < g_.sources.size(); ++key) {
            const int64_t width = dots_A() ? 0 : round_up(lanes_.source_width[key], e_.lanes);
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
            if (!dots_A()) {
                e_.pack_rows(path.lora_A, path.rows, source.columns, lora_A_[path.source] + lanes_.of_source[p],
                             round_up(lanes_.source_width[path.source], e_.lanes));
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

    // Rows of h, [rows][width] before dropout's scale: into hidden, and with scale and gate into the output's low-rank rows.
    void store_hidden(const Path& path, size_t p, float* h, int64_t width, int64_t row, int64_t rows, float* staged) const {
        const int64_t staged_width = lanes_.output_width[path.output];
        h += lanes_.of_source[p];
        if (g_.dropout) {
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t j = 0; j < path.rows; ++j) h[i * width + j] *= g_.dropout_scale;
            }
        }
        for (int64_t i = 0; i < rows; ++i) {
            float* to = staged + i * staged_width + lanes_.of_output[p];
            for (int64_t j = 0; j < path.rows; ++j) {
                const float gate = path.gate[j];
                to[j] = gate == 0.0f ? 0.0f : h[i * width + j] * (gate * path.scaling);
            }
        }
        if (g_.hidden == nullptr) return;
        copy_rows(e_, {h, DType::f32, width}, rows, path.rows,
                  static_cast<char*>(g_.hidden) + (row * g_.hidden_ld + path.hidden_column) * size_of(g_.dtype), g_.dtype,
                  g_.hidden_ld);
    }

    Group& g_;
    const Engine& e_;
    Parallel parallel_;
    Lanes lanes_;
    Blocks blocks_;
    Slots shared_;
    const uint32_t* few_x_ = nullptr; // [units(K)][rows in whole vectors]
    std::vector<const uint32_t*> weights_;
    std::vector<uint32_t*> lora_A_;   // per source: [units(columns)][lanes], lanes a multiple of a vector
    std::vector<uint32_t*> lora_B_;   // per output: panels of N columns over its lanes
};

}  // namespace

void forward(Group& group, const Parallel& parallel) {
    if (group.rows == 0) return;
    Forward(group, parallel).run();
}

}  // namespace hlk
