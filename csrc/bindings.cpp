// fastloop._native: the C ABI for Python. Pointers are integers, so any array library of any version can call it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fastloop.h"

namespace py = pybind11;

namespace {

template <class T>
T* pointer(std::uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

void check(fastloop_status status) {
    if (status != FASTLOOP_OK) throw py::value_error(fastloop_last_error());
}

void mel(std::size_t batch, std::size_t samples, std::uintptr_t pcm, std::size_t pcm_stride, std::uintptr_t slots,
         std::size_t slot_count, std::uintptr_t tail, std::uintptr_t peak, std::uintptr_t seen, std::size_t bins,
         std::uintptr_t filters, std::uintptr_t bands, int edge, int clamp, std::uintptr_t frames,
         const char* isa) {
    fastloop_mel_params p{};
    p.struct_size = sizeof p;
    p.batch = batch;
    p.samples = samples;
    p.pcm = pointer<const float>(pcm);
    p.pcm_stride = pcm_stride;
    p.slots = pointer<const std::int64_t>(slots);
    p.slot_count = slot_count;
    p.tail = pointer<float>(tail);
    p.peak = pointer<float>(peak);
    p.seen = pointer<std::int64_t>(seen);
    p.bins = bins;
    p.filters = pointer<const float>(filters);
    p.bands = pointer<const std::int32_t>(bands);
    p.edge = edge;
    p.clamp = clamp;
    p.frames = pointer<float>(frames);
    p.isa = isa;
    fastloop_status status;
    {
        py::gil_scoped_release release;
        status = fastloop_mel(&p);
    }
    check(status);  // same thread, so the message is this call's
}

// Handles that Python owns.
struct TeamDeleter {
    void operator()(fastloop_team* team) const { fastloop_team_destroy(team); }
};
struct Team {
    std::unique_ptr<fastloop_team, TeamDeleter> handle;
    Team(std::size_t threads, bool pin) {
        fastloop_team* made = nullptr;
        check(fastloop_team_create(threads, pin, &made));
        handle.reset(made);
    }
};

struct WeightDeleter {
    void operator()(fastloop_weight* weight) const { fastloop_weight_destroy(weight); }
};
struct Weight {
    std::unique_ptr<fastloop_weight, WeightDeleter> handle;
    Weight(int format, int source, std::size_t out, std::size_t in, bool gated, std::uintptr_t data,
           std::uintptr_t scale, std::size_t group) {
        fastloop_weight_params p{};
        p.struct_size = sizeof p;
        p.format = format;
        p.source = source;
        p.out = out;
        p.in = in;
        p.gated = gated;
        p.data = pointer<const void>(data);
        p.scale = pointer<const void>(scale);
        p.group = group;
        fastloop_weight* made = nullptr;
        fastloop_status status;
        {
            py::gil_scoped_release release;
            status = fastloop_weight_create(&p, &made);
        }
        check(status);
        handle.reset(made);
    }
};

void linear(const Weight& weight, Team* team, std::size_t rows, std::uintptr_t x, std::size_t x_stride,
            std::uintptr_t bias, int epilogue, std::uintptr_t residual, std::size_t residual_stride, std::uintptr_t out,
            std::size_t out_stride, const char* isa) {
    fastloop_linear_params p{};
    p.struct_size = sizeof p;
    p.weight = weight.handle.get();
    p.team = team == nullptr ? nullptr : team->handle.get();
    p.rows = rows;
    p.x = pointer<const float>(x);
    p.x_stride = x_stride;
    p.bias = pointer<const float>(bias);
    p.epilogue = epilogue;
    p.residual = pointer<const float>(residual);
    p.residual_stride = residual_stride;
    p.out = pointer<float>(out);
    p.out_stride = out_stride;
    p.isa = isa;
    fastloop_status status;
    {
        py::gil_scoped_release release;
        status = fastloop_linear(&p);
    }
    check(status);
}

// Models are described by dicts: weights are Weight objects, vectors are addresses. The caller keeps all of it alive.
class Fields {
  public:
    explicit Fields(const py::dict& dict) : dict_(dict) {}
    template <class T>
    T get(const char* name) const {
        if (!dict_.contains(name)) throw py::key_error(std::string("the native model needs ") + name);
        return dict_[name].cast<T>();
    }
    const float* vector(const char* name) const { return pointer<const float>(get<std::uintptr_t>(name)); }
    const fastloop_weight* weight(const char* name) const { return get<const Weight&>(name).handle.get(); }

  private:
    const py::dict& dict_;
};

struct EncoderDeleter {
    void operator()(fastloop_encoder* encoder) const { fastloop_encoder_destroy(encoder); }
};
struct Encoder {
    std::unique_ptr<fastloop_encoder, EncoderDeleter> handle;

    Encoder(const py::dict& dict, const std::vector<py::dict>& layers, const char* isa) {
        std::vector<fastloop_encoder_layer> made;
        for (const py::dict& layer : layers) {
            const Fields f(layer);
            made.push_back({f.vector("norm1.weight"), f.vector("norm1.bias"), f.weight("qkv.weight"), f.vector("qkv.bias"),
                            f.weight("out.weight"), f.vector("out.bias"), f.vector("norm2.weight"), f.vector("norm2.bias"),
                            f.weight("fc1.weight"), f.vector("fc1.bias"), f.weight("fc2.weight"), f.vector("fc2.bias")});
        }
        const Fields f(dict);
        fastloop_encoder_params p{};
        p.struct_size = sizeof p;
        p.bins = f.get<std::size_t>("bins");
        p.width = f.get<std::size_t>("width");
        p.heads = f.get<std::size_t>("heads");
        p.layers = made.size();
        p.conv1 = f.weight("conv1.weight");
        p.conv1_bias = f.vector("conv1.bias");
        p.conv2 = f.weight("conv2.weight");
        p.conv2_bias = f.vector("conv2.bias");
        p.positions = f.vector("positions");
        p.most_positions = f.get<std::size_t>("most_positions");
        p.layer = made.data();
        p.norm_weight = f.vector("norm.weight");
        p.norm_bias = f.vector("norm.bias");
        p.proj = f.weight("proj.weight");
        p.proj_bias = f.vector("proj.bias");
        p.norm_eps = f.get<float>("norm_eps");
        p.isa = isa;
        fastloop_encoder* raw = nullptr;
        check(fastloop_encoder_create(&p, &raw));
        handle.reset(raw);
    }

    void encode(Team& team, std::size_t chunks, std::size_t frames, std::uintptr_t mel, std::uintptr_t tokens) {
        fastloop_encode_params p{};
        p.struct_size = sizeof p;
        p.team = team.handle.get();
        p.chunks = chunks;
        p.frames = frames;
        p.mel = pointer<const float>(mel);
        p.tokens = pointer<float>(tokens);
        fastloop_status status;
        {
            py::gil_scoped_release release;
            status = fastloop_encode(handle.get(), &p);
        }
        check(status);
    }
};

struct DecoderDeleter {
    void operator()(fastloop_decoder* decoder) const { fastloop_decoder_destroy(decoder); }
};
struct Decoder {
    std::unique_ptr<fastloop_decoder, DecoderDeleter> handle;

    Decoder(const py::dict& dict, const std::vector<py::dict>& layers, const char* isa) {
        std::vector<fastloop_decoder_layer> made;
        for (const py::dict& layer : layers) {
            const Fields f(layer);
            made.push_back({f.vector("norm1.weight"), f.weight("qkv.weight"), f.vector("qkv.bias"), f.weight("out.weight"),
                            f.vector("norm2.weight"), f.weight("gate_up.weight"), f.weight("down.weight")});
        }
        const Fields f(dict);
        fastloop_decoder_params p{};
        p.struct_size = sizeof p;
        p.width = f.get<std::size_t>("width");
        p.heads = f.get<std::size_t>("heads");
        p.kv_heads = f.get<std::size_t>("kv_heads");
        p.head_width = f.get<std::size_t>("head_width");
        p.layers = made.size();
        p.layer = made.data();
        p.norm_weight = f.vector("norm.weight");
        p.head = f.weight("head.weight");
        p.inv_freq = pointer<const double>(f.get<std::uintptr_t>("inv_freq"));
        p.norm_eps = f.get<float>("norm_eps");
        p.isa = isa;
        fastloop_decoder* raw = nullptr;
        check(fastloop_decoder_create(&p, &raw));
        handle.reset(raw);
    }

    void decode(Team& team, std::size_t rows, std::size_t sequences, std::uintptr_t x, std::uintptr_t positions,
                std::uintptr_t slots, std::uintptr_t row_starts, std::uintptr_t block_table, std::size_t table_width,
                std::uintptr_t kv_lens, std::uintptr_t gaps, int page_format, std::uintptr_t k_pages,
                std::uintptr_t v_pages, std::size_t pages, std::size_t page_tokens, std::size_t logit_rows,
                std::uintptr_t logit_row, std::uintptr_t logits) {
        fastloop_decode_params p{};
        p.struct_size = sizeof p;
        p.team = team.handle.get();
        p.rows = rows;
        p.sequences = sequences;
        p.x = pointer<float>(x);
        p.positions = pointer<const std::int64_t>(positions);
        p.slots = pointer<const std::int64_t>(slots);
        p.row_starts = pointer<const std::int32_t>(row_starts);
        p.block_table = pointer<const std::int32_t>(block_table);
        p.table_width = table_width;
        p.kv_lens = pointer<const std::int32_t>(kv_lens);
        p.gaps = pointer<const std::int32_t>(gaps);
        p.page_format = page_format;
        p.k_pages = pointer<void>(k_pages);
        p.v_pages = pointer<void>(v_pages);
        p.pages = pages;
        p.page_tokens = page_tokens;
        p.logit_rows = logit_rows;
        p.logit_row = pointer<const std::int64_t>(logit_row);
        p.logits = pointer<float>(logits);
        fastloop_status status;
        {
            py::gil_scoped_release release;
            status = fastloop_decode(handle.get(), &p);
        }
        check(status);
    }
};

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "fastloop's compiled kernels: csrc/include/fastloop.h, call by call. ValueError where a call fails.";
    m.def("abi_version", &fastloop_abi_version);
    m.def("isas", &fastloop_isas, "Instruction sets usable on this machine, best first.");
    m.def("mel", &mel, py::arg("batch"), py::arg("samples"), py::arg("pcm"), py::arg("pcm_stride"), py::arg("slots"),
          py::arg("slot_count"), py::arg("tail"), py::arg("peak"), py::arg("seen"), py::arg("bins"), py::arg("filters"),
          py::arg("bands"), py::arg("edge"), py::arg("clamp"), py::arg("frames"), py::arg("isa") = py::none(),
          "fastloop_mel: every pointer is an integer address of host memory.");
    py::class_<Team>(m, "Team", "fastloop_team: the threads that native calls share.")
        .def(py::init<std::size_t, bool>(), py::arg("threads"), py::arg("pin") = false);
    py::class_<Weight>(m, "Weight", "fastloop_weight: a matrix packed for `linear`.")
        .def(py::init<int, int, std::size_t, std::size_t, bool, std::uintptr_t, std::uintptr_t, std::size_t>(),
             py::arg("format"), py::arg("source"), py::arg("out"), py::arg("in_"), py::arg("gated"), py::arg("data"),
             py::arg("scale") = 0, py::arg("group") = 0)
        .def_property_readonly("nbytes", [](const Weight& w) { return fastloop_weight_bytes(w.handle.get()); });
    m.def("linear", &linear, py::arg("weight"), py::arg("team").none(true), py::arg("rows"), py::arg("x"),
          py::arg("x_stride"), py::arg("bias"), py::arg("epilogue"), py::arg("residual"), py::arg("residual_stride"),
          py::arg("out"), py::arg("out_stride"), py::arg("isa") = py::none(), "fastloop_linear.");
    py::class_<Encoder>(m, "Encoder", "fastloop_encoder.")
        .def(py::init<const py::dict&, const std::vector<py::dict>&, const char*>(), py::arg("fields"), py::arg("layers"),
             py::arg("isa") = py::none())
        .def("encode", &Encoder::encode, py::arg("team"), py::arg("chunks"), py::arg("frames"), py::arg("mel"),
             py::arg("tokens"));
    py::class_<Decoder>(m, "Decoder", "fastloop_decoder.")
        .def(py::init<const py::dict&, const std::vector<py::dict>&, const char*>(), py::arg("fields"), py::arg("layers"),
             py::arg("isa") = py::none())
        .def("decode", &Decoder::decode, py::arg("team"), py::arg("rows"), py::arg("sequences"), py::arg("x"),
             py::arg("positions"), py::arg("slots"), py::arg("row_starts"), py::arg("block_table"), py::arg("table_width"),
             py::arg("kv_lens"), py::arg("gaps"), py::arg("page_format"), py::arg("k_pages"), py::arg("v_pages"),
             py::arg("pages"), py::arg("page_tokens"), py::arg("logit_rows"), py::arg("logit_row"), py::arg("logits"));
    m.def(
        "ceiling",
        [](int kind, Team& team, const char* isa) {
            double rate = 0;
            fastloop_status status;
            {
                py::gil_scoped_release release;
                status = fastloop_ceiling(kind, team.handle.get(), isa, &rate);
            }
            check(status);
            return rate;
        },
        py::arg("kind"), py::arg("team"), py::arg("isa") = py::none(), "fastloop_ceiling: operations or bytes a second.");
}
