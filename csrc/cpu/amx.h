// The engine of AMX bf16, over a policy `Tiles` that gives the eight tile registers: those of the processor, or arrays in memory.
// Packing, conversions and what is not a product are those of AVX-512 bf16. Included after the target is set.
//
// Every tile is 16 rows of 64 bytes, so one configuration serves all products; rows, units and lanes are padded with zeros.
//
//   strip         groups of 32 rows (the last may have 16), each [block of 16 units][rows][16 units]: an A operand is 1 KB in one
//                 piece, whatever the distance of x's rows, and packing copies rows without transposing them
//   panel         [units][32 columns]: 16 units of 16 columns are a B operand, with rows 128 bytes apart
//   coefficients  [32 rows][lanes][16 pairs of rows]: 16 lanes are an A operand
#pragma once

#include "avx512_bf16.h"

namespace hlk {
namespace {

using AmxUnit = PairUnit<Avx512Bf16>;

constexpr int amx_side = 16;                          // rows of a tile, and units of its rows
constexpr int amx_operand = amx_side * amx_side;      // units of an A operand
constexpr int amx_group = 2 * amx_side;               // rows of a strip
constexpr int amx_panel = 2 * amx_side;
// Rows of a tile call: its panel is read once into the first cache for four groups.
constexpr int amx_tile_rows = 4 * amx_group;
// Unit blocks of a panel that stay in the first cache between two groups of rows: 20 KB of panel, 20 KB of a group's strip
// that stream past it and 4 KB of sums fit into 48 KB.
constexpr int64_t amx_chunk = 10;

void amx_pack_strip(Matrix source, Keep keep, int64_t rows, int64_t depth, uint32_t* out) {
    using I = Avx512Bf16;
    constexpr int width = 2 * amx_side;
    // Columns that are copied row by row before the next: some cache lines of each row, so that reading runs ahead.
    constexpr int64_t run = 8;
    const int64_t blocks = (depth + width - 1) / width;
    for (int64_t group = 0; group < rows; group += amx_group) {
        const int64_t here = rows - group < amx_group ? rows - group : amx_group;
        const int64_t padded = (here + amx_side - 1) / amx_side * amx_side;
        for (int64_t first = 0; first < blocks; first += run) {
            const int64_t last = first + run < blocks ? first + run : blocks;
            for (int64_t i = 0; i < padded; ++i) {
                for (int64_t block = first; block < last; ++block) {
                    const auto units = i < here ? AmxUnit::along(source, group + i, block * width, depth - block * width, keep)
                                                : I::zero_units();
                    I::store_units(out + (block * padded + i) * amx_side, units);
                }
            }
        }
        out += blocks * padded * amx_side;
    }
}

void amx_pack_coefficients(Matrix source, int64_t rows, int64_t first, int64_t count, uint32_t* out, int64_t lanes) {
    using I = Avx512Bf16;
    const int64_t padded = (lanes + amx_side - 1) / amx_side * amx_side;
    for (int64_t row = 0; row < rows; row += 2 * amx_side) {
        const int64_t here = rows - row < 2 * amx_side ? rows - row : 2 * amx_side;
        for (int64_t lane = 0; lane < count; lane += amx_side) {
            const int64_t some = count - lane < amx_side ? count - lane : amx_side;
            alignas(64) uint32_t pairs[amx_operand] = {};
            pack_columns<I, AmxUnit>(source.at(row, lane), here, some, pairs, amx_side);
            I::U units[amx_side];
            for (int i = 0; i < amx_side; ++i) units[i] = I::load_units(pairs + i * amx_side);
            I::transpose(units);
            uint32_t* to = out + (row / (2 * amx_side) * padded + first + lane) * amx_side;
            for (int64_t i = 0; i < some; ++i) I::store_units(to + i * amx_side, units[i]);
        }
    }
}

// A block of 16 units of a tile's segments.
struct AmxPlace {
    int segment;
    int64_t block;
};

// At most `blocks` further, and not past segment `last`.
AmxPlace amx_advance(const Tile& t, AmxPlace place, int64_t blocks, int last) {
    while (place.segment < last) {
        const int64_t left = t.segments[place.segment].units / amx_side - place.block;
        if (blocks < left) return {place.segment, place.block + blocks};
        blocks -= left;
        place = {place.segment + 1, 0};
    }
    return place;
}

// sums[32 rows][32 columns] (+)= the unit blocks from `from` to `to` for group `group` of the rows: ROWS x COLUMNS tiles.
// Tiles 0-3 accumulate, 4 and 5 are operands A, 6 and 7 operands B.
template <class Tiles, int ROWS, int COLUMNS>
void amx_products(const Tile& t, AmxPlace from, AmxPlace to, int64_t group, bool fresh, float* sums) {
    constexpr int64_t row_bytes = 4 * amx_panel;
    float* below = sums + amx_side * amx_panel;
    if (fresh) {
        Tiles::template zero<0>();
        if constexpr (COLUMNS == 2) Tiles::template zero<1>();
        if constexpr (ROWS == 2) Tiles::template zero<2>();
        if constexpr (ROWS == 2 && COLUMNS == 2) Tiles::template zero<3>();
    } else {
        Tiles::template load<0>(sums, row_bytes);
        if constexpr (COLUMNS == 2) Tiles::template load<1>(sums + amx_side, row_bytes);
        if constexpr (ROWS == 2) Tiles::template load<2>(below, row_bytes);
        if constexpr (ROWS == 2 && COLUMNS == 2) Tiles::template load<3>(below + amx_side, row_bytes);
    }
    for (int s = from.segment; s <= to.segment && s < t.num_segments; ++s) {
        const Segment& segment = t.segments[s];
        const int64_t first = s == from.segment ? from.block : 0;
        const int64_t last = s == to.segment ? to.block : segment.units / amx_side;
        const uint32_t* a = segment.a.data + group * amx_group * segment.units + first * ROWS * amx_operand;
        const uint32_t* b = segment.b + first * amx_side * segment.b_stride;
        const int64_t b_bytes = 4 * segment.b_stride, b_step = amx_side * segment.b_stride;
        for (int64_t block = first; block < last; ++block) {
            Tiles::template load<4>(a, 4 * amx_side);
            Tiles::template load<6>(b, b_bytes);
            Tiles::template dot<0, 4, 6>();
            if constexpr (COLUMNS == 2) {
                Tiles::template load<7>(b + amx_side, b_bytes);
                Tiles::template dot<1, 4, 7>();
            }
            if constexpr (ROWS == 2) {
                Tiles::template load<5>(a + amx_operand, 4 * amx_side);
                Tiles::template dot<2, 5, 6>();
                if constexpr (COLUMNS == 2) Tiles::template dot<3, 5, 7>();
            }
            a += ROWS * amx_operand;
            b += b_step;
        }
    }
    Tiles::template store<0>(sums, row_bytes);
    if constexpr (COLUMNS == 2) Tiles::template store<1>(sums + amx_side, row_bytes);
    if constexpr (ROWS == 2) Tiles::template store<2>(below, row_bytes);
    if constexpr (ROWS == 2 && COLUMNS == 2) Tiles::template store<3>(below + amx_side, row_bytes);
}

template <class Tiles>
void amx_products(const Tile& t, AmxPlace from, AmxPlace to, int64_t group, bool fresh, float* sums) {
    const bool tall = t.rows - group * amx_group > amx_side, wide = t.vectors == 2;
    if (tall) {
        wide ? amx_products<Tiles, 2, 2>(t, from, to, group, fresh, sums)
             : amx_products<Tiles, 2, 1>(t, from, to, group, fresh, sums);
    } else {
        wide ? amx_products<Tiles, 1, 2>(t, from, to, group, fresh, sums)
             : amx_products<Tiles, 1, 1>(t, from, to, group, fresh, sums);
    }
}

inline int64_t amx_rows(const Tile& t, int64_t group) {
    const int64_t left = t.rows - group * amx_group;
    return left < amx_group ? left : amx_group;
}

inline void amx_keep(const Tile& t, int64_t group, float* sums) {
    using I = Avx512Bf16;
    for (int64_t i = 0; i < amx_rows(t, group); ++i) {
        const uint64_t bits = bits_at(t.keep.bits + (group * amx_group + i) * t.keep.ld, 0, t.columns);
        for (int v = 0; v < t.vectors; ++v) {
            float* at = sums + i * amx_panel + v * amx_side;
            I::store(at, I::keep(I::load(at), bits >> (v * amx_side)));
        }
    }
}

inline void amx_finish(const Tile& t, int64_t group, const float* sums) {
    using I = Avx512Bf16;
    const int64_t first = group * amx_group, rows = amx_rows(t, group);
    I::F bias[2];
    for (int v = 0; v < 2; ++v) bias[v] = v * amx_side < t.columns ? bias_of<I>(t, v * amx_side) : I::zero();
    if (t.columns == amx_panel && t.base.data == nullptr && t.out_dtype == DType::bf16) {
        // What nearly every tile is, in as few instructions as it takes: the tile unit waits meanwhile.
        for (int64_t i = 0; i < rows; ++i) {
            const auto low = I::add(I::load(sums + i * amx_panel), bias[0]);
            const auto high = I::add(I::load(sums + i * amx_panel + amx_side), bias[1]);
            auto* to = static_cast<uint16_t*>(t.out) + (first + i) * t.out_ld;
            _mm512_storeu_si512(to, I::pairs_along(low, high));
        }
        return;
    }
    for (int64_t i = 0; i < rows; ++i) {
        for (int v = 0; v < 2 && v * amx_side < t.columns; ++v) {
            finish_vector<I>(t, first + i, v * amx_side, I::load(sums + i * amx_panel + v * amx_side), bias[v]);
        }
    }
}

// The panel in chunks that stay in the first cache while the groups of rows pass by; sums wait in memory between two chunks.
template <class Tiles>
void amx_tile(const Tile& t) {
    alignas(64) float sums[amx_tile_rows * amx_panel];
    constexpr int group_sums = amx_group * amx_panel;
    const int64_t groups = (t.rows + amx_group - 1) / amx_group;
    const bool keeps = t.keep.bits != nullptr && t.num_segments > 0;
    int64_t total = 0;
    for (int s = 0; s < t.num_segments; ++s) total += t.segments[s].units / amx_side;
    const int64_t chunks = groups == 1 ? 1 : (total + amx_chunk - 1) / amx_chunk;
    const int64_t chunk = chunks == 0 ? 0 : (total + chunks - 1) / chunks;
    if (total == 0) {
        __builtin_memset(sums, 0, 4 * t.rows * amx_panel);
        for (int64_t group = 0; group < groups; ++group) amx_finish(t, group, sums + group * group_sums);
        return;
    }
    AmxPlace from{0, 0};
    for (bool fresh = true; from.segment < t.num_segments; fresh = false) {
        // The first segment by itself where its sum is masked.
        const bool masked = keeps && fresh;
        const AmxPlace to = masked ? AmxPlace{1, 0} : amx_advance(t, from, chunk, t.num_segments);
        for (int64_t group = 0; group < groups; ++group) {
            float* at = sums + group * group_sums;
            amx_products<Tiles>(t, from, to, group, fresh, at);
            if (masked) amx_keep(t, group, at);
            if (to.segment == t.num_segments) amx_finish(t, group, at);
        }
        from = to;
    }
}

// 32 columns of up to `amx_tile_rows` rows as B operands [pairs of rows, padded to 16][32 columns].
template <bool KEEP>
void amx_interleave(const Outer& o, int64_t width, uint32_t* pairs) {
    using I = Avx512Bf16;
    alignas(64) uint16_t ends[amx_tile_rows * amx_panel];
    alignas(64) uint8_t bits[amx_tile_rows * 8];
    Outer whole = o;
    if (width < amx_panel) {
        // The rows' ends, copied: nothing beyond a row is read.
        __builtin_memset(ends, 0, sizeof(ends));
        __builtin_memset(bits, 0, sizeof(bits));
        for (int64_t i = 0; i < o.rows; ++i) {
            __builtin_memcpy(ends + i * amx_panel, o.u.at(i, 0).data, 2 * width);
            if (KEEP) __builtin_memcpy(bits + i * 8, o.keep.bits + i * o.keep.ld, (width + 7) / 8);
        }
        whole.u = {ends, DType::bf16, amx_panel};
        if (KEEP) whole.keep = {bits, 8};
    }
    const int64_t padded = (o.rows + 2 * amx_side - 1) / (2 * amx_side) * (2 * amx_side);
    for (int64_t row = 0; row < padded; row += 2) {
        I::U right[2] = {I::zero_units(), I::zero_units()};
        if (row < o.rows) outer_units<I, AmxUnit, DType::bf16, KEEP, false>(whole, row, right);
        I::store_units(pairs + row / 2 * amx_panel, right[0]);
        I::store_units(pairs + row / 2 * amx_panel + amx_side, right[1]);
    }
}

// 16 lanes x 32 columns: tiles 0 and 1 accumulate, 4 is operand A, 6 and 7 are operands B.
template <class Tiles>
void amx_outer_products(const uint32_t* coef, int64_t coef_step, const uint32_t* pairs, int64_t rows, float* sums) {
    Tiles::template zero<0>();
    Tiles::template zero<1>();
    for (int64_t row = 0; row < rows; row += 2 * amx_side) {
        Tiles::template load<4>(coef, 4 * amx_side);
        Tiles::template load<6>(pairs, 4 * amx_panel);
        Tiles::template dot<0, 4, 6>();
        Tiles::template load<7>(pairs + amx_side, 4 * amx_panel);
        Tiles::template dot<1, 4, 7>();
        coef += coef_step;
        pairs += amx_side * amx_panel;
    }
    Tiles::template store<0>(sums, 4 * amx_panel);
    Tiles::template store<1>(sums + amx_side, 4 * amx_panel);
}

template <class Tiles>
void amx_outer(const Outer& o) {
    using I = Avx512Bf16;
    alignas(64) uint32_t pairs[amx_tile_rows / 2 * amx_panel];
    alignas(64) float sums[amx_side * amx_panel];
    const int64_t coef_step = (o.lanes + amx_side - 1) / amx_side * amx_operand;
    for (int64_t column = 0; column < o.columns; column += amx_panel) {
        const int64_t width = o.columns - column < amx_panel ? o.columns - column : amx_panel;
        for (int64_t row = 0; row < o.rows; row += amx_tile_rows) {
            Outer part = o;
            part.rows = o.rows - row < amx_tile_rows ? o.rows - row : amx_tile_rows;
            part.u = o.u.at(row, column);
            part.keep = o.keep.at(row, column);
            o.keep.bits == nullptr ? amx_interleave<false>(part, width, pairs) : amx_interleave<true>(part, width, pairs);
            for (int first = 0; first < o.count; first += amx_side) {
                const uint32_t* coef = o.coef + row / (2 * amx_side) * coef_step + first * amx_side;
                amx_outer_products<Tiles>(coef, coef_step, pairs, part.rows, sums);
                const int count = o.count - first < amx_side ? o.count - first : amx_side;
                for (int j = 0; j < count; ++j) {
                    float* to = o.out + (first + j) * o.out_ld + column;
                    for (int64_t c = 0; c < width; c += I::W) {
                        auto value = I::load(sums + j * amx_panel + c);
                        if (row > 0) value = I::add(value, load_up_to<I>({to, DType::f32, 0}, 0, c, width - c));
                        store_up_to<I>(to, DType::f32, c, width - c, value);
                    }
                }
            }
        }
    }
}

template <class Tiles>
constexpr Engine make_amx_engine(const char* name) {
    Engine engine = make_engine<Avx512Bf16, AmxUnit>(name);
    engine.max_rows = amx_group;
    engine.tile_rows = amx_tile_rows;
    // These processors have 2 MB of second cache, and their tiles would wait for a weight that is read once per 128 rows.
    engine.block_rows = 256;
    engine.row_step = engine.unit_step = amx_side;
    engine.row_tiles = engine.row_dots = false;
    engine.pack_strip = amx_pack_strip;
    engine.pack_coefficients = amx_pack_coefficients;
    engine.tile = amx_tile<Tiles>;
    engine.outer = amx_outer<Tiles>;
    engine.begin = Tiles::begin;
    engine.end = Tiles::end;
    return engine;
}

}  // namespace
}  // namespace hlk
