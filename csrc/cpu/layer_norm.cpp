// The host side of `layer_norm`.
#include "isa.h"
#include "rows.h"
#include "status.h"

using namespace fastloop;

extern "C" fastloop_status fastloop_layer_norm(const fastloop_layer_norm_params* params) {
    constexpr const char* kWhere = "layer_norm";
    return guarded(kWhere, [params] {
        const fastloop_layer_norm_params p = adopt(kWhere, params);
        const Isa isa = choose_isa(kWhere, p.isa);
        if (p.rows == 0 || p.width == 0) return;
        need(kWhere, "x", p.x);
        need(kWhere, "weight", p.weight);
        need(kWhere, "bias", p.bias);
        need(kWhere, "out", p.out);
        apart(kWhere, "x", p.rows, p.width, p.x_stride);
        apart(kWhere, "out", p.rows, p.width, p.out_stride);
        for (size_t row = 0; row < p.rows; ++row)
            FASTLOOP_KERNEL(isa, layer_norm)
            (p.x + row * p.x_stride, p.weight, p.bias, p.width, p.eps, p.out + row * p.out_stride);
    });
}
