// fastloop._native.cuda: mel, paged_attention, decide and sample of csrc/include/fastloop_cuda.h.
#include "bindings_cuda.h"

namespace {

using std::size_t;

void mel(const CudaModule& module, size_t batch, size_t samples, Address pcm, size_t pcm_stride, Address slots,
         size_t slot_count, Address tail, Address peak, Address seen, size_t bins, Address filters, Address bands, int edge,
         int clamp, Address frames, bool dependent, Address stream) {
    fastloop_cuda_mel_params p{};
    p.struct_size = sizeof p;
    p.module = module.handle.get();
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
    p.dependent = dependent;
    p.stream = pointer<void>(stream);
    call(fastloop_cuda_mel, &p);
}

// One call of paged_attention, described, so that its workspace can be asked for before it is launched.
struct PagedAttention {
    fastloop_cuda_paged_attention_params p{};

    PagedAttention(const CudaModule& module, int dtype, int page_dtype, size_t rows, size_t sequences, size_t heads, Address q,
                   Address k_pages, Address v_pages, size_t page_tokens, size_t kv_heads, size_t head_width,
                   Address row_starts, Address block_table, size_t table_width, size_t table_stride, Address kv_lens,
                   Address gaps, Address out, int blocks, int kernel) {
        p.struct_size = sizeof p;
        p.module = module.handle.get();
        p.dtype = dtype;
        p.page_dtype = page_dtype;
        p.rows = rows;
        p.sequences = sequences;
        p.heads = heads;
        p.q = pointer<const void>(q);
        p.k_pages = pointer<const void>(k_pages);
        p.v_pages = pointer<const void>(v_pages);
        p.page_tokens = page_tokens;
        p.kv_heads = kv_heads;
        p.head_width = head_width;
        p.row_starts = pointer<const std::int32_t>(row_starts);
        p.block_table = pointer<const std::int32_t>(block_table);
        p.table_width = table_width;
        p.table_stride = table_stride;
        p.kv_lens = pointer<const std::int32_t>(kv_lens);
        p.gaps = pointer<const std::int32_t>(gaps);
        p.out = pointer<void>(out);
        p.blocks = blocks;
        p.kernel = kernel;
    }

    size_t workspace() const {
        size_t bytes = 0;
        call(fastloop_cuda_paged_attention_workspace, &p, &bytes);
        return bytes;
    }
    void launch(Address workspace, size_t workspace_bytes, bool dependent, Address stream) const {
        fastloop_cuda_paged_attention_params own = p;
        own.workspace = pointer<void>(workspace);
        own.workspace_bytes = workspace_bytes;
        own.dependent = dependent;
        own.stream = pointer<void>(stream);
        call(fastloop_cuda_paged_attention, &own);
    }
};

void decide(const CudaModule& module, int dtype, size_t rows, size_t width, Address x, size_t x_stride, Address norm_weight,
            double eps, Address head, Address slots, size_t slot_count, Address policy, Address state, Address p_respond,
            Address decision, bool dependent, Address stream) {
    fastloop_cuda_decide_params p{};
    p.struct_size = sizeof p;
    p.module = module.handle.get();
    p.dtype = dtype;
    p.rows = rows;
    p.width = width;
    p.x = pointer<const void>(x);
    p.x_stride = x_stride;
    p.norm_weight = pointer<const void>(norm_weight);
    p.eps = eps;
    p.head = pointer<const void>(head);
    p.slots = pointer<const std::int64_t>(slots);
    p.slot_count = slot_count;
    p.policy = pointer<const float>(policy);
    p.state = pointer<std::int32_t>(state);
    p.p_respond = pointer<float>(p_respond);
    p.decision = pointer<std::int32_t>(decision);
    p.dependent = dependent;
    p.stream = pointer<void>(stream);
    call(fastloop_cuda_decide, &p);
}

void sample(const CudaModule& module, int dtype, size_t rows, size_t vocab, Address logits, size_t logits_stride,
            Address banned, Address phase, Address temperature, Address top_k, Address top_p, Address seed, Address counter,
            Address tokens, bool dependent, Address stream) {
    fastloop_cuda_sample_params p{};
    p.struct_size = sizeof p;
    p.module = module.handle.get();
    p.dtype = dtype;
    p.rows = rows;
    p.vocab = vocab;
    p.logits = pointer<const void>(logits);
    p.logits_stride = logits_stride;
    p.banned = pointer<const std::uint8_t>(banned);
    p.phase = pointer<const std::int64_t>(phase);
    p.temperature = pointer<const float>(temperature);
    p.top_k = pointer<const std::int64_t>(top_k);
    p.top_p = pointer<const float>(top_p);
    p.seed = pointer<const std::int64_t>(seed);
    p.counter = pointer<const std::int64_t>(counter);
    p.tokens = pointer<std::int64_t>(tokens);
    p.dependent = dependent;
    p.stream = pointer<void>(stream);
    call(fastloop_cuda_sample, &p);
}

}  // namespace

void bind_cuda_ops(py::module_& cuda) {
    using py::arg;
    cuda.def("mel", &mel, arg("module"), arg("batch"), arg("samples"), arg("pcm"), arg("pcm_stride"), arg("slots"),
             arg("slot_count"), arg("tail"), arg("peak"), arg("seen"), arg("bins"), arg("filters"), arg("bands"), arg("edge"),
             arg("clamp"), arg("frames"), arg("dependent"), arg("stream"), "fastloop_cuda_mel.");
    py::class_<PagedAttention>(cuda, "PagedAttention",
                               "fastloop_cuda_paged_attention_params: one call; its module must outlive it.")
        .def(py::init<const CudaModule&, int, int, size_t, size_t, size_t, Address, Address, Address, size_t, size_t, size_t,
                      Address, Address, size_t, size_t, Address, Address, Address, int, int>(),
             py::keep_alive<1, 2>(), arg("module"), arg("dtype"), arg("page_dtype"), arg("rows"), arg("sequences"),
             arg("heads"), arg("q"), arg("k_pages"), arg("v_pages"), arg("page_tokens"), arg("kv_heads"), arg("head_width"),
             arg("row_starts"), arg("block_table"), arg("table_width"), arg("table_stride"), arg("kv_lens"), arg("gaps"),
             arg("out"), arg("blocks") = 0, arg("kernel") = 0)
        .def_property_readonly("workspace_bytes", &PagedAttention::workspace)
        .def("launch", &PagedAttention::launch, arg("workspace"), arg("workspace_bytes"), arg("dependent"), arg("stream"),
             "Start it on a stream.");
    cuda.def("decide", &decide, arg("module"), arg("dtype"), arg("rows"), arg("width"), arg("x"), arg("x_stride"),
             arg("norm_weight"), arg("eps"), arg("head"), arg("slots"), arg("slot_count"), arg("policy"), arg("state"),
             arg("p_respond"), arg("decision"), arg("dependent"), arg("stream"), "fastloop_cuda_decide.");
    cuda.def("sample", &sample, arg("module"), arg("dtype"), arg("rows"), arg("vocab"), arg("logits"), arg("logits_stride"),
             arg("banned"), arg("phase"), arg("temperature"), arg("top_k"), arg("top_p"), arg("seed"), arg("counter"),
             arg("tokens"), arg("dependent"), arg("stream"), "fastloop_cuda_sample.");
}
