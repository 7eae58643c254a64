// fastloop._native: the C ABI for Python, and the models behind it.
#include "bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace {

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
        call(fastloop_encode, handle.get(), &p);
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
                std::uintptr_t logit_row, std::uintptr_t logits, int page_layout, std::uintptr_t key_range) {
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
        p.page_layout = page_layout;
        p.key_range = pointer<const float>(key_range);
        call(fastloop_decode, handle.get(), &p);
    }
};

}  // namespace

PYBIND11_MODULE(_native, m) {
    m.doc() = "fastloop's compiled kernels: csrc/include/fastloop.h, call by call. ValueError where a call fails.";
    m.def("abi_version", &fastloop_abi_version);
    m.def("isas", &fastloop_isas, "Instruction sets usable on this machine, best first.");
    py::class_<Team>(m, "Team", "fastloop_team: the threads that native calls share.")
        .def(py::init<std::size_t, bool>(), py::arg("threads"), py::arg("pin") = false);
    py::class_<Weight>(m, "Weight", "fastloop_weight: a matrix packed for `linear`.")
        .def(py::init<int, int, std::size_t, std::size_t, bool, std::uintptr_t, std::uintptr_t, std::size_t>(),
             py::arg("format"), py::arg("source"), py::arg("out"), py::arg("in_"), py::arg("gated"), py::arg("data"),
             py::arg("scale") = 0, py::arg("group") = 0)
        .def_property_readonly("nbytes", [](const Weight& w) { return fastloop_weight_bytes(w.handle.get()); });
    bind_ops(m);
    bind_cuda(m);
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
             py::arg("pages"), py::arg("page_tokens"), py::arg("logit_rows"), py::arg("logit_row"), py::arg("logits"),
             py::arg("page_layout") = 0, py::arg("key_range") = 0);
    m.def(
        "ceiling",
        [](int kind, Team& team, const char* isa) {
            double rate = 0;
            call(fastloop_ceiling, kind, team.handle.get(), isa, &rate);
            return rate;
        },
        py::arg("kind"), py::arg("team"), py::arg("isa") = py::none(), "fastloop_ceiling: operations or bytes a second.");
}
