// The host side of `rms_norm`, and of the residual that is added first.
#include "isa.h"
#include "rows.h"
#include "status.h"

using namespace fastloop;

extern "C" fastloop_status fastloop_rms_norm(const fastloop_rms_norm_params* params) {
    constexpr const char* kWhere = "rms_norm";
    return guarded(kWhere, [params] {
        const fastloop_rms_norm_params p = adopt(kWhere, params);
        const Isa isa = choose_isa(kWhere, p.isa);
        if (p.rows == 0 || p.width == 0) return;
        need(kWhere, "x", p.x);
        need(kWhere, "weight", p.weight);
        need(kWhere, "out", p.out);
        aligned(kWhere, "residual", p.residual);
        apart(kWhere, "x", p.rows, p.width, p.x_stride);
        apart(kWhere, "out", p.rows, p.width, p.out_stride);
        if (p.residual != nullptr) apart(kWhere, "residual", p.rows, p.width, p.residual_stride);
        for (size_t row = 0; row < p.rows; ++row) {
            const float* x = p.x + row * p.x_stride;
            if (p.residual != nullptr) {
                float* const sum = p.residual + row * p.residual_stride;
                FASTLOOP_KERNEL(isa, add_row)(x, p.width, sum);
                x = sum;
            }
            FASTLOOP_KERNEL(isa, rms_norm)(x, p.weight, p.width, p.eps, p.out + row * p.out_stride);
        }
    });
}
