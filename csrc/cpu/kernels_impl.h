// The kernels of kernels.h as templates over an instruction set `I` (its vectors and their operations) and the kind of unit.
// Included once per instruction set, after its target is set: no header with inline functions of its own may come after
// that, or the linker may pick a copy that the processor cannot run.
#pragma once

#include "impl_dot.h"
#include "impl_keep.h"
#include "impl_merge.h"
#include "impl_outer.h"
#include "impl_pack.h"
#include "impl_rows.h"
#include "impl_tile.h"

namespace hlk {
namespace {

template <class I, class Unit>
constexpr Engine make_engine(const char* name) {
    Engine engine{};
    engine.name = name;
    engine.unit = Unit::unit;
    engine.lanes = I::W;
    engine.max_rows = engine.tile_rows = I::MAX_ROWS;
    // A block's rows packed at K = 2048 in bf16 take 0.5 MB.
    engine.block_rows = 128;
    engine.row_step = engine.unit_step = 1;
    engine.row_tiles = engine.row_dots = true;
    engine.pack_strip = pack_strip<I, Unit>;
    engine.pack_rows = pack_panel_rows<I, Unit>;
    engine.pack_columns = pack_columns<I, Unit>;
    engine.pack_transposed = pack_transposed<I, Unit>;
    engine.pack_coefficients = pack_coefficients<I, Unit>;
    engine.tile = tile<I, Unit>;
    engine.outer = outer<I, Unit>;
    engine.dot = dot<I, Unit>;
    engine.convert = convert<I>;
    engine.moments = moments<I>;
    engine.add = add<I>;
    engine.merge = merge<I>;
    engine.merge_columns = merge_columns<I>;
    engine.keep_bits = keep_bits<I>;
    return engine;
}

}  // namespace
}  // namespace hlk
