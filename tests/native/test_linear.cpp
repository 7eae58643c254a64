// linear: every format and instruction set against sums in float64; rows alone and beside others; odd sizes everywhere.
#include <algorithm>

#include "check.h"

namespace {

// What the kernels make of a row: int8 and int4 round it to bytes with a scale of its own, bfloat16 to bfloat16.
std::vector<double> rounded(const float* x, size_t count, int32_t format) {
    std::vector<double> row(x, x + count);
    if (format == FASTLOOP_BFLOAT16)
        for (double& v : row) v = from_bfloat16(to_bfloat16(static_cast<float>(v)));
    if (format < FASTLOOP_INT8) return row;
    float top = 0;
    for (size_t k = 0; k < count; ++k) top = std::max(top, std::fabs(x[k]));
    for (size_t k = 0; k < count; ++k)
        row[k] = top > 0 ? std::nearbyint(x[k] * (127.0f / top)) * static_cast<double>(top / 127.0f) : 0.0;
    return row;
}

double gelu(double x) { return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0))); }
double silu(double x) { return x / (1 + std::exp(-x)); }

struct Case {
    int32_t format;
    size_t rows, in, out;
    bool gated, bias, residual, activated;
};

void run(const Case& c, const char* isa, fastloop_team* team, uint64_t seed) {
    Random random(seed);
    const Matrix weight(random, c.format, c.out, c.in, c.gated);
    const size_t width = c.gated ? c.out / 2 : c.out, x_stride = c.in + 3, out_stride = width + 5;
    Floats x = random.numbers((c.rows - 1) * x_stride + c.in);
    for (size_t r = 0; r + 1 < c.rows; ++r)
        for (size_t k = c.in; k < x_stride; ++k) x[r * x_stride + k] = NAN;  // between the rows
    const Floats bias = random.numbers(c.out), residual = random.numbers(c.rows * width);
    Floats out((c.rows - 1) * out_stride + width, 77.0f);
    auto p = params<fastloop_linear_params>();
    p.weight = weight.handle;
    p.team = team;
    p.rows = c.rows;
    p.x = x.data();
    p.x_stride = x_stride;
    p.bias = c.bias ? bias.data() : nullptr;
    p.epilogue = c.activated ? FASTLOOP_GELU : FASTLOOP_NONE;
    p.residual = c.residual ? residual.data() : nullptr;
    p.residual_stride = width;
    p.out = out.data();
    p.out_stride = out_stride;
    p.isa = isa;
    CHECK_OK(fastloop_linear(&p));
    Floats made;
    std::vector<double> truth;
    for (size_t r = 0; r < c.rows; ++r) {
        const std::vector<double> row = rounded(x.data() + r * x_stride, c.in, c.format);
        std::vector<double> y(c.out);
        for (size_t o = 0; o < c.out; ++o) {
            for (size_t k = 0; k < c.in; ++k) y[o] += row[k] * weight.values[o * c.in + k];
            y[o] += c.bias ? bias[o] : 0;
        }
        for (size_t o = 0; o < width; ++o) {
            const double v = c.gated ? silu(y[o]) * y[width + o] : c.activated ? gelu(y[o]) : y[o];
            truth.push_back(v + (c.residual ? residual[r * width + o] : 0));
            made.push_back(out[r * out_stride + o]);
        }
        for (size_t o = width; r + 1 < c.rows && o < out_stride; ++o) CHECK(out[r * out_stride + o] == 77.0f);
    }
    CHECK(relative_error(made, truth) <= kFloatBound);
    for (size_t r = 0; r < c.rows; ++r) {  // alone
        Floats one(width);
        auto alone = p;
        alone.rows = 1;
        alone.x = p.x + r * x_stride;
        alone.residual = c.residual ? residual.data() + r * width : nullptr;
        alone.out = one.data();
        CHECK_OK(fastloop_linear(&alone));
        CHECK(std::memcmp(one.data(), made.data() + r * width, width * sizeof(float)) == 0);
    }
}

}  // namespace

int main() {
    const Team team(2);
    uint64_t seed = 0;
    for (const std::string& isa : isas())
        for (int32_t format : {FASTLOOP_FLOAT32, FASTLOOP_BFLOAT16, FASTLOOP_INT8, FASTLOOP_INT4})
            for (size_t rows : {1, 2, 13, 15, 31})
                for (size_t in : {32, 96})
                    for (size_t out : {2, 30, 66}) {
                        const size_t odd = format == FASTLOOP_INT4 ? 0 : seed % 5;  // int4 takes whole groups
                        const bool gated = seed % 3 == 0;
                        run({format, rows, in + odd, out, gated, seed % 2 == 0, seed % 5 < 2, !gated && seed % 4 == 1},
                            isa.c_str(), seed % 2 ? team.handle : nullptr, seed);
                        ++seed;
                    }
    run({FASTLOOP_FLOAT32, 130, 384, 384, false, true, false, false}, nullptr, team.handle, 1);  // large enough to be shared
    run({FASTLOOP_INT8, 130, 384, 384, false, true, false, false}, nullptr, team.handle, 2);
    return 0;
}
