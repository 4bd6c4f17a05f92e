#include "products.h"

namespace hlk {

namespace {

// 0 times nan is nan: what a closed row contributes is zeroed before it is multiplied.
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
    const int64_t filled = (depth + engine.unit - 1) / engine.unit, units = engine.units(depth);
    if (here < width) {
        std::memset(to, 0, 4 * width * units);
    } else {
        std::memset(to + width * filled, 0, 4 * width * (units - filled));
    }
    if (along_rows) {
        engine.pack_rows(weight.values.at(first, 0), here, depth, to, width);
    } else {
        engine.pack_columns(weight.values.at(0, first), depth, here, to, width);
    }
}

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

void pack_path(const Engine& engine, const Path& path, Matrix parameter, bool along_rows, int64_t columns, int64_t first_lane,
               int64_t lanes, uint32_t* panels) {
    const int width = engine.panel();
    for (int64_t column = 0; column < columns; column += width) {
        const int64_t here = std::min<int64_t>(width, columns - column);
        uint32_t* panel = panels + column * engine.units(lanes);
        uint32_t* to = panel + first_lane / engine.unit * width;
        if (along_rows) {
            engine.pack_rows(parameter.at(column, 0), here, path.rows, to, width);
        } else {
            engine.pack_columns(parameter.at(0, column), path.rows, here, to, width);
        }
        close_lanes(engine, path, first_lane, panel, width);
    }
}

void few_along_columns(const Engine& engine, const uint32_t* strip, int64_t rows, Matrix w, int64_t columns, int64_t depth,
                       float* out, int64_t out_ld, bool accumulate) {
    Outer outer;
    outer.count = static_cast<int>(rows);
    outer.columns = static_cast<int>(columns);
    outer.rows = depth;
    outer.coef = strip;
    outer.lanes = rows;
    outer.u = w;
    outer.out = out;
    outer.out_ld = out_ld;
    outer.accumulate = accumulate;
    engine.outer(outer);
}

void strip_product(const Engine& engine, Left left, int64_t rows, const uint32_t* panel, int64_t width, int64_t units, float* out) {
    for (int64_t lane = 0; lane < width; lane += engine.panel()) {
        const Segment segment{left, panel + lane, width, units};
        Tile tile;
        tile.rows = static_cast<int>(rows);
        tile.columns = static_cast<int>(std::min<int64_t>(engine.panel(), width - lane));
        tile.vectors = tile.columns > engine.lanes ? 2 : 1;
        tile.segments = &segment;
        tile.num_segments = 1;
        tile.out = out + lane;
        tile.out_ld = width;
        engine.tile(tile);
    }
}

}  // namespace hlk
