// fastloop._native.<op>: every call of the C ABI that is an op, keyword by keyword; addresses are integers, 0 is NULL.
#include "bindings.h"

using std::size_t;
using Address = std::uintptr_t;

namespace {

fastloop_team* handle(Team* team) { return team == nullptr ? nullptr : team->handle.get(); }

void mel(size_t batch, size_t samples, Address pcm, size_t pcm_stride, Address slots, size_t slot_count, Address tail,
         Address peak, Address seen, size_t bins, Address filters, Address bands, int edge, int clamp, Address frames,
         const char* isa) {
    const fastloop_mel_params p{sizeof p, batch, samples, pointer<const float>(pcm), pcm_stride,
                                pointer<const std::int64_t>(slots), slot_count, pointer<float>(tail), pointer<float>(peak),
                                pointer<std::int64_t>(seen), bins, pointer<const float>(filters),
                                pointer<const std::int32_t>(bands), edge, clamp, pointer<float>(frames), isa};
    call(fastloop_mel, &p);
}

void linear(const Weight& weight, Team* team, size_t rows, Address x, size_t x_stride, Address bias, int epilogue,
            Address residual, size_t residual_stride, Address out, size_t out_stride, const char* isa) {
    const fastloop_linear_params p{sizeof p, weight.handle.get(), handle(team), rows, pointer<const float>(x), x_stride,
                                   pointer<const float>(bias), epilogue, pointer<const float>(residual), residual_stride,
                                   pointer<float>(out), out_stride, isa};
    call(fastloop_linear, &p);
}

void rms_norm(size_t rows, size_t width, Address x, size_t x_stride, Address weight, float eps, Address residual,
              size_t residual_stride, Address out, size_t out_stride, const char* isa) {
    const fastloop_rms_norm_params p{sizeof p, rows, width, pointer<const float>(x), x_stride, pointer<const float>(weight),
                                     eps, pointer<float>(residual), residual_stride, pointer<float>(out), out_stride, isa};
    call(fastloop_rms_norm, &p);
}

void layer_norm(size_t rows, size_t width, Address x, size_t x_stride, Address weight, Address bias, float eps, Address out,
                size_t out_stride, const char* isa) {
    const fastloop_layer_norm_params p{sizeof p, rows, width, pointer<const float>(x), x_stride,
                                       pointer<const float>(weight), pointer<const float>(bias), eps, pointer<float>(out),
                                       out_stride, isa};
    call(fastloop_layer_norm, &p);
}

void conv_stem(Team* team, size_t blocks, size_t frames, size_t bins, size_t width, Address mel, const Weight& conv1,
               Address conv1_bias, const Weight& conv2, Address conv2_bias, Address positions, Address out, const char* isa) {
    const fastloop_conv_stem_params p{sizeof p, handle(team), blocks, frames, bins, width, pointer<const float>(mel),
                                      conv1.handle.get(), pointer<const float>(conv1_bias), conv2.handle.get(),
                                      pointer<const float>(conv2_bias), pointer<const float>(positions), pointer<float>(out),
                                      isa};
    call(fastloop_conv_stem, &p);
}

void rope_append(size_t rows, size_t heads, size_t kv_heads, size_t head_width, Address qkv, size_t qkv_stride, Address bias,
                 Address positions, Address slots, Address inv_freq, int page_format, Address k_pages, Address v_pages,
                 size_t pages, size_t page_tokens, Address q, const char* isa) {
    const fastloop_rope_append_params p{sizeof p, rows, heads, kv_heads, head_width, pointer<const float>(qkv), qkv_stride,
                                        pointer<const float>(bias), pointer<const std::int64_t>(positions),
                                        pointer<const std::int64_t>(slots), pointer<const double>(inv_freq), page_format,
                                        pointer<void>(k_pages), pointer<void>(v_pages), pages, page_tokens,
                                        pointer<float>(q), isa};
    call(fastloop_rope_append, &p);
}

void block_attention(Team* team, size_t blocks, size_t positions, size_t heads, size_t head_width, Address qkv, Address out,
                     const char* isa) {
    const fastloop_block_attention_params p{sizeof p, handle(team), blocks, positions, heads, head_width,
                                            pointer<const float>(qkv), pointer<float>(out), isa};
    call(fastloop_block_attention, &p);
}

void paged_attention(Team* team, size_t rows, size_t sequences, size_t heads, Address q, int page_format, Address k_pages,
                     Address v_pages, size_t pages, size_t page_tokens, size_t kv_heads, size_t head_width,
                     Address row_starts, Address block_table, size_t table_width, Address kv_lens, Address gaps, Address out,
                     const char* isa) {
    const fastloop_paged_attention_params p{sizeof p, handle(team), rows, sequences, heads, pointer<const float>(q),
                                            page_format, pointer<void>(k_pages), pointer<void>(v_pages), pages, page_tokens,
                                            kv_heads, head_width, pointer<const std::int32_t>(row_starts),
                                            pointer<const std::int32_t>(block_table), table_width,
                                            pointer<const std::int32_t>(kv_lens), pointer<const std::int32_t>(gaps),
                                            pointer<float>(out), isa};
    call(fastloop_paged_attention, &p);
}

void decide(size_t rows, size_t width, Address x, size_t x_stride, Address norm_weight, float eps, Address head,
            Address slots, size_t slot_count, Address policy, Address state, Address p_respond, Address decision,
            const char* isa) {
    const fastloop_decide_params p{sizeof p, rows, width, pointer<const float>(x), x_stride,
                                   pointer<const float>(norm_weight), eps, pointer<const float>(head),
                                   pointer<const std::int64_t>(slots), slot_count, pointer<const float>(policy),
                                   pointer<std::int32_t>(state), pointer<float>(p_respond),
                                   pointer<std::int32_t>(decision), isa};
    call(fastloop_decide, &p);
}

void sample(size_t rows, size_t vocab, Address logits, size_t logits_stride, size_t phases, Address banned, Address phase,
            Address temperature, Address top_k, Address top_p, Address seed, Address counter, Address tokens,
            const char* isa) {
    const fastloop_sample_params p{sizeof p, rows, vocab, pointer<const float>(logits), logits_stride, phases,
                                   pointer<const std::uint8_t>(banned), pointer<const std::int64_t>(phase),
                                   pointer<const float>(temperature), pointer<const std::int64_t>(top_k),
                                   pointer<const float>(top_p), pointer<const std::int64_t>(seed),
                                   pointer<const std::int64_t>(counter), pointer<std::int64_t>(tokens), isa};
    call(fastloop_sample, &p);
}

}  // namespace

void bind_ops(py::module_& m) {
    const py::arg team("team"), rows("rows"), width("width"), x("x"), x_stride("x_stride"), weight("weight"), bias("bias");
    const py::arg out("out"), out_stride("out_stride"), slots("slots"), heads("heads"), kv_heads("kv_heads");
    const py::arg head_width("head_width"), pages("pages"), page_tokens("page_tokens"), page_format("page_format");
    const py::arg k_pages("k_pages"), v_pages("v_pages"), positions("positions"), residual("residual"), eps("eps");
    const py::arg residual_stride("residual_stride"), bins("bins"), frames("frames"), blocks("blocks"), q("q"), qkv("qkv");
    const py::arg slot_count("slot_count");
    const py::arg_v isa("isa", py::none());
    m.def("mel", &mel, py::arg("batch"), py::arg("samples"), py::arg("pcm"), py::arg("pcm_stride"), slots, slot_count,
          py::arg("tail"), py::arg("peak"), py::arg("seen"), bins, py::arg("filters"), py::arg("bands"), py::arg("edge"),
          py::arg("clamp"), frames, isa, "fastloop_mel.");
    m.def("linear", &linear, weight, team, rows, x, x_stride, bias, py::arg("epilogue"), residual, residual_stride, out,
          out_stride, isa, "fastloop_linear.");
    m.def("rms_norm", &rms_norm, rows, width, x, x_stride, weight, eps, residual, residual_stride, out, out_stride, isa,
          "fastloop_rms_norm.");
    m.def("layer_norm", &layer_norm, rows, width, x, x_stride, weight, bias, eps, out, out_stride, isa,
          "fastloop_layer_norm.");
    m.def("conv_stem", &conv_stem, team, blocks, frames, bins, width, py::arg("mel"), py::arg("conv1"),
          py::arg("conv1_bias"), py::arg("conv2"), py::arg("conv2_bias"), positions, out, isa, "fastloop_conv_stem.");
    m.def("rope_append", &rope_append, rows, heads, kv_heads, head_width, qkv, py::arg("qkv_stride"), bias, positions, slots,
          py::arg("inv_freq"), page_format, k_pages, v_pages, pages, page_tokens, q, isa, "fastloop_rope_append.");
    m.def("block_attention", &block_attention, team, blocks, positions, heads, head_width, qkv, out, isa,
          "fastloop_block_attention.");
    m.def("paged_attention", &paged_attention, team, rows, py::arg("sequences"), heads, q, page_format, k_pages, v_pages,
          pages, page_tokens, kv_heads, head_width, py::arg("row_starts"), py::arg("block_table"), py::arg("table_width"),
          py::arg("kv_lens"), py::arg("gaps"), out, isa, "fastloop_paged_attention.");
    m.def("decide", &decide, rows, width, x, x_stride, py::arg("norm_weight"), eps, py::arg("head"), slots, slot_count,
          py::arg("policy"), py::arg("state"), py::arg("p_respond"), py::arg("decision"), isa, "fastloop_decide.");
    m.def("sample", &sample, rows, py::arg("vocab"), py::arg("logits"), py::arg("logits_stride"), py::arg("phases"),
          py::arg("banned"), py::arg("phase"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"), py::arg("seed"),
          py::arg("counter"), py::arg("tokens"), isa, "fastloop_sample.");
}
