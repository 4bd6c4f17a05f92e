#include "row_statistics.h"

#include <cmath>
#include <vector>

#include "scalar.h"

namespace hlk {
namespace {

template <DType D> struct Element;
template <> struct Element<DType::f32> {
    using Stored = float;
    static float load(float value) { return value; }
};
template <> struct Element<DType::bf16> {
    using Stored = uint16_t;
    static float load(uint16_t value) { return float_of_bf16(value); }
};
template <> struct Element<DType::f16> {
    using Stored = uint16_t;
    static float load(uint16_t value) { return float_of_f16(value); }
};

// What one element adds to the sums of its rank.
struct Sums {
    double squares = 0, products = 0, abs_products = 0, products_sq = 0;

    void add(double parameter, double gradient) {
        const double product = parameter * gradient;
        squares += gradient * gradient;
        products += product;
        abs_products += std::fabs(product);
        products_sq += product * product;
    }
    void add(const Sums& other) {
        squares += other.squares;
        products += other.products;
        abs_products += other.abs_products;
        products_sq += other.products_sq;
    }
};

template <DType D>
void rows_of(const PathGradients& path) {
    using T = typename Element<D>::Stored;
    const auto load = Element<D>::load;
    constexpr int lanes = 8;
    std::vector<Sums> b_sums(path.rank);
    const auto *lora_B = static_cast<const T*>(path.lora_B), *grad_B = static_cast<const T*>(path.grad_B);
    for (int64_t i = 0; i < path.out; ++i) {
        for (int64_t j = 0; j < path.rank; ++j) b_sums[j].add(load(lora_B[i * path.rank + j]), load(grad_B[i * path.rank + j]));
    }
    for (int64_t j = 0; j < path.rank; ++j) {
        const T *a = static_cast<const T*>(path.lora_A) + j * path.in, *gradient = static_cast<const T*>(path.grad_A) + j * path.in;
        // Independent chains: one would wait for its own additions.
        Sums parts[lanes];
        int64_t k = 0;
        for (; k + lanes <= path.in; k += lanes) {
            for (int lane = 0; lane < lanes; ++lane) parts[lane].add(load(a[k + lane]), load(gradient[k + lane]));
        }
        for (; k < path.in; ++k) parts[0].add(load(a[k]), load(gradient[k]));
        Sums a_sums;
        for (const Sums& part : parts) a_sums.add(part);
        float* stats = path.stats + j * num_stats_columns;
        stats[hidden_sq] = 0;  // cannot be known from gradients
        stats[grad_A_sq] = static_cast<float>(a_sums.squares);
        stats[grad_B_sq] = static_cast<float>(b_sums[j].squares);
        stats[abs_A_grad_A] = static_cast<float>(a_sums.abs_products);
        stats[abs_B_grad_B] = static_cast<float>(b_sums[j].abs_products);
        stats[gate_grad] = static_cast<float>(a_sums.products);
        stats[taylor_sq] = static_cast<float>(a_sums.products_sq + b_sums[j].products_sq);
    }
}

}  // namespace

void row_statistics(const PathGradients& path) {
    switch (path.dtype) {
        case DType::f32: return rows_of<DType::f32>(path);
        case DType::bf16: return rows_of<DType::bf16>(path);
        default: return rows_of<DType::f16>(path);
    }
}

}  // namespace hlk
