// Nodes of FLASH_ATTN_EXT through ggml's scheduler, with hyperattn before the CPU backend, against the CPU backend
// alone; and whether exactly those of them move to hyperattn that should.
//
//     compare libggml-hyperattn.so all|long LEAST MOST [SEED]
//
// Nodes of up to 4,096 keys are exact under every method. One, "long", has more: its relative error must be in
// LEAST .. MOST.
#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace {

// Queries that a node must have to be taken.
constexpr int64_t LEAST_QUERIES = 64;

// Of the relative error. Both sides add up f32 products of the same numbers in another order. Where the processor has
// products of bf16, hyperattn rounds the weights to that, each to within 2^-9 of itself.
double tolerance(ggml_type type)
{
    return type == GGML_TYPE_BF16 ? 1.0 / 512 : 2e-6;
}

int checks = 0;
int failures = 0;

void check(bool passed, const std::string &what)
{
    ++checks;
    if (!passed) {
        ++failures;
        std::fprintf(stderr, "FAILED: %s\n", what.c_str());
    }
}

enum class mask_kind { absent, visible, causal, window, two_sequences, distances, some_streams_causal };

// A node as programs make it: q, k, v with the tokens outside and the heads inside, permuted to ggml's order.
struct node_case {
    std::string name;
    bool taken = true;
    int64_t queries = 512;
    int64_t cached = 300;
    int64_t heads = 6;
    int64_t kv_heads = 2;
    int64_t key_dim = 64;
    int64_t value_dim = 64;
    int64_t streams = 1;
    ggml_type type = GGML_TYPE_F16;
    mask_kind mask = mask_kind::causal;
    float max_bias = 0;
    float softcap = 0;
    bool sinks = false;

    int64_t tokens() const { return cached + queries; }
    int64_t cells() const { return (tokens() + 255) / 256 * 256; }
};

bool sees(const node_case &node, int64_t stream, int64_t i, int64_t j)
{
    const int64_t position = node.cached + i;
    switch (node.mask) {
    case mask_kind::absent:
        return true;
    case mask_kind::visible:
        return j < node.tokens();
    case mask_kind::causal:
    case mask_kind::distances:
        return j <= position;
    case mask_kind::window:
        return j <= position && j > position - 100;
    case mask_kind::two_sequences:
        return j <= position && (j < node.cached + 40) == (i < 40);
    case mask_kind::some_streams_causal:
        return stream % 2 == 0 ? j <= position - stream : j < 200 + i % 7;
    }
    return false;
}

class graph {
public:
    graph(uint32_t seed, const std::vector<node_case> &cases) : random_(seed)
    {
        ggml_init_params params = {};
        params.mem_size = 1024 * ggml_tensor_overhead() + ggml_graph_overhead();
        params.no_alloc = true;
        inputs_.reset(ggml_init(params));
        nodes_.reset(ggml_init(params));
        graph_ = ggml_new_graph(nodes_.get());
        for (const node_case &wanted : cases)
            add(wanted);
    }

    // The outputs of all nodes, after the backends, in this order of precedence, have run the graph. Once only: the
    // scheduler leaves the tensors in memory that is freed with it.
    std::vector<std::vector<float>> compute(std::vector<ggml_backend_t> backends)
    {
        fill(backends.back());
        std::unique_ptr<ggml_backend_sched, void (*)(ggml_backend_sched_t)> scheduler(
            ggml_backend_sched_new(backends.data(), nullptr, static_cast<int>(backends.size()), 1024, false, true),
            ggml_backend_sched_free);
        std::vector<std::vector<float>> outputs;
        if (!ggml_backend_sched_alloc_graph(scheduler.get(), graph_)) {
            check(false, "ggml_backend_sched_alloc_graph");
            return outputs;
        }
        check_places(scheduler.get(), backends);
        const ggml_status status = ggml_backend_sched_graph_compute(scheduler.get(), graph_);
        check(status == GGML_STATUS_SUCCESS, "the graph is computed");
        for (const entry &entry : entries_) {
            outputs.emplace_back(ggml_nelements(entry.last));
            ggml_backend_tensor_get(entry.last, outputs.back().data(), 0, ggml_nbytes(entry.last));
        }
        return outputs;
    }

private:
    struct entry {
        node_case wanted;
        ggml_tensor *node;
        ggml_tensor *last;
        ggml_tensor *mask;
    };

    // Adds the node between two others that no backend but the CPU's has.
    void add(const node_case &wanted)
    {
        ggml_context *ctx = nodes_.get();
        ggml_tensor *q = input(GGML_TYPE_F32, wanted.key_dim, wanted.heads, wanted.queries, wanted.streams);
        ggml_tensor *k = input(wanted.type, wanted.key_dim, wanted.kv_heads, cells(wanted), wanted.streams);
        ggml_tensor *v = input(wanted.type, wanted.value_dim, wanted.kv_heads, cells(wanted), wanted.streams);
        ggml_tensor *mask = nullptr;
        if (wanted.mask != mask_kind::absent)
            mask = input(GGML_TYPE_F16, cells(wanted), wanted.queries, 1, mask_streams(wanted));

        ggml_tensor *doubled = ggml_scale(ctx, q, 2.0f);
        const auto permuted = [&](ggml_tensor *tensor) { return ggml_permute(ctx, tensor, 0, 2, 1, 3); };
        const float scale = 0.5f / std::sqrt(static_cast<float>(wanted.key_dim));
        ggml_tensor *node = ggml_flash_attn_ext(ctx, permuted(doubled), permuted(k), permuted(v), mask, scale,
                                                wanted.max_bias, wanted.softcap);
        if (wanted.sinks)
            ggml_flash_attn_ext_add_sinks(node, input(GGML_TYPE_F32, wanted.heads, 1, 1, 1));
        ggml_tensor *flat = ggml_reshape_2d(ctx, node, node->ne[0] * node->ne[1], node->ne[2] * node->ne[3]);
        ggml_tensor *last = ggml_scale(ctx, flat, 1.0f);
        ggml_set_output(last);
        ggml_build_forward_expand(graph_, last);
        entries_.push_back({wanted, node, last, mask});
    }

    // Puts the inputs in the CPU backend's memory, with the same numbers for the same seed.
    void fill(ggml_backend_t cpu)
    {
        buffer_.reset(ggml_backend_alloc_ctx_tensors(inputs_.get(), cpu));
        for (ggml_tensor *tensor = ggml_get_first_tensor(inputs_.get()); tensor;
             tensor = ggml_get_next_tensor(inputs_.get(), tensor))
            fill_gaussian(tensor);
        for (const entry &entry : entries_) {
            if (entry.mask)
                fill_mask(entry);
        }
    }

    static int64_t cells(const node_case &wanted)
    {
        return wanted.mask == mask_kind::absent ? wanted.tokens() : wanted.cells();
    }
    static int64_t mask_streams(const node_case &wanted)
    {
        return wanted.mask == mask_kind::some_streams_causal ? wanted.streams : 1;
    }

    ggml_tensor *input(ggml_type type, int64_t a, int64_t b, int64_t c, int64_t d)
    {
        return ggml_new_tensor_4d(inputs_.get(), type, a, b, c, d);
    }

    // Multiples of 1/32 of at most 8 bits, which bf16 has too: the CPU backend rounds queries to the type of the keys.
    void fill_gaussian(ggml_tensor *tensor)
    {
        std::normal_distribution<float> gaussian;
        std::vector<float> values(ggml_nelements(tensor));
        for (float &value : values)
            value = std::clamp(std::round(gaussian(random_) * 32), -127.0f, 127.0f) / 32;
        std::vector<char> bytes(ggml_nbytes(tensor));
        if (tensor->type == GGML_TYPE_F32)
            std::memcpy(bytes.data(), values.data(), bytes.size());
        else
            ggml_quantize_chunk(tensor->type, values.data(), bytes.data(), 0, ggml_nrows(tensor), tensor->ne[0],
                                nullptr);
        ggml_backend_tensor_set(tensor, bytes.data(), 0, bytes.size());
    }

    void fill_mask(const entry &entry)
    {
        const node_case &wanted = entry.wanted;
        std::vector<ggml_fp16_t> values;
        for (int64_t stream = 0; stream < mask_streams(wanted); ++stream) {
            for (int64_t i = 0; i < wanted.queries; ++i) {
                for (int64_t j = 0; j < wanted.cells(); ++j) {
                    const float distance = static_cast<float>(std::abs(wanted.cached + i - j)) / 64;
                    const float seen = wanted.mask == mask_kind::distances ? -distance : 0.0f;
                    values.push_back(ggml_fp32_to_fp16(sees(wanted, stream, i, j) ? seen : -INFINITY));
                }
            }
        }
        ggml_backend_tensor_set(entry.mask, values.data(), 0, values.size() * sizeof values[0]);
    }

    // Exactly the nodes that are to be taken are at the first of two backends.
    void check_places(ggml_backend_sched_t scheduler, const std::vector<ggml_backend_t> &backends)
    {
        for (int i = 0; i < ggml_graph_n_nodes(graph_); ++i) {
            ggml_tensor *node = ggml_graph_node(graph_, i);
            const auto found =
                std::find_if(entries_.begin(), entries_.end(), [&](const entry &e) { return e.node == node; });
            const bool view = node->view_src != nullptr;
            const bool taken = backends.size() > 1 && found != entries_.end() && found->wanted.taken;
            const std::string name = found != entries_.end() ? found->wanted.name : ggml_op_desc(node);
            if (!view)
                check((ggml_backend_sched_get_tensor_backend(scheduler, node) == backends.front()) ==
                          (taken || backends.size() == 1),
                      name + (taken ? " is taken" : " is left to the CPU backend"));
        }
    }

    std::mt19937 random_;
    std::unique_ptr<ggml_context, void (*)(ggml_context *)> inputs_{nullptr, ggml_free};
    std::unique_ptr<ggml_context, void (*)(ggml_context *)> nodes_{nullptr, ggml_free};
    std::unique_ptr<ggml_backend_buffer, void (*)(ggml_backend_buffer_t)> buffer_{nullptr, ggml_backend_buffer_free};
    ggml_cgraph *graph_ = nullptr;
    std::vector<entry> entries_;
};

std::vector<node_case> node_cases()
{
    std::vector<node_case> cases;
    const auto add = [&](const char *name, bool taken, auto change) {
        node_case added;
        added.name = name;
        added.taken = taken;
        change(added);
        cases.push_back(added);
    };
    const auto type = [](ggml_type type) { return [=](node_case &node) { node.type = type; }; };
    const auto mask = [](mask_kind mask) { return [=](node_case &node) { node.mask = mask; }; };
    add("long", true, [](node_case &node) { node.cached = 6000; });
    add("f16, causal", true, [](node_case &) {});
    add("bf16, causal", true, type(GGML_TYPE_BF16));
    add("f32, causal", true, type(GGML_TYPE_F32));
    add("nothing cached", true, [](node_case &node) { node.cached = 0; });
    add("64 queries", true, [](node_case &node) { node.queries = LEAST_QUERIES; });
    add("63 queries", false, [](node_case &node) { node.queries = LEAST_QUERIES - 1; });
    add("one query", false, [](node_case &node) { node.queries = 1; });
    add("one head for all", true, [](node_case &node) { node.kv_heads = 1; });
    add("a head for each", true, [](node_case &node) { node.kv_heads = node.heads; });
    add("head_dim 128, values 80", true, [](node_case &node) { node.key_dim = 128, node.value_dim = 80; });
    add("head_dim 256", true, [](node_case &node) { node.key_dim = node.value_dim = 256; });
    add("head_dim 264", false, [](node_case &node) { node.key_dim = 264; });
    add("no mask", true, mask(mask_kind::absent));
    add("padding only", true, mask(mask_kind::visible));
    add("window", true, mask(mask_kind::window));
    add("two sequences", true, mask(mask_kind::two_sequences));
    add("distances in the mask", true, mask(mask_kind::distances));
    add("streams", true, [](node_case &node) { node.streams = 3; });
    add("streams of several kinds", true, [](node_case &node) {
        node.streams = 3;
        node.mask = mask_kind::some_streams_causal;
    });
    add("ALiBi", false, [](node_case &node) { node.max_bias = 8; });
    add("soft cap", false, [](node_case &node) { node.softcap = 20; });
    add("sinks", true, [](node_case &node) { node.sinks = true; });
    add("q8_0", false, type(GGML_TYPE_Q8_0));
    return cases;
}

double relative_error(const std::vector<float> &got, const std::vector<float> &wanted)
{
    double difference = 0;
    double norm = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
        difference += (got[i] - wanted[i]) * static_cast<double>(got[i] - wanted[i]);
        norm += wanted[i] * static_cast<double>(wanted[i]);
    }
    return std::sqrt(difference / norm);
}

ggml_backend_t start(ggml_backend_dev_t device)
{
    ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
    using set_threads = void (*)(ggml_backend_t, int);
    void *found = ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(device), "ggml_backend_set_n_threads");
    check(found != nullptr, "ggml_backend_set_n_threads is found");
    reinterpret_cast<set_threads>(found)(backend, 2);
    return backend;
}

void compare(const char *path, const std::string &nodes, double least, double most, uint32_t seed)
{
    ggml_backend_reg_t registry = ggml_backend_load(path);
    check(registry != nullptr, "the backend is loaded");
    if (!registry)
        return;
    ggml_backend_dev_t device = ggml_backend_reg_dev_get(registry, 0);
    std::printf("compare: %s: %s, seed %u\n", ggml_backend_dev_name(device),
                ggml_backend_dev_description(device), seed);
    check(ggml_backend_dev_type(device) == GGML_BACKEND_DEVICE_TYPE_ACCEL, "the device is an ACCEL");

    const std::unique_ptr<ggml_backend, void (*)(ggml_backend_t)> cpu(
        start(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU)), ggml_backend_free);
    const std::unique_ptr<ggml_backend, void (*)(ggml_backend_t)> hyperattn(start(device), ggml_backend_free);
    std::vector<node_case> cases = node_cases();
    if (nodes == "long")
        cases.erase(std::remove_if(cases.begin(), cases.end(), [](const node_case &c) { return c.name != "long"; }),
                    cases.end());
    const auto wanted = graph(seed, cases).compute({cpu.get()});
    const auto got = graph(seed, cases).compute({hyperattn.get(), cpu.get()});
    for (size_t i = 0; i < std::min(got.size(), wanted.size()); ++i) {
        const double error = relative_error(got[i], wanted[i]);
        std::printf("  %-26s %.1e\n", cases[i].name.c_str(), error);
        const bool is_long = cases[i].cells() > 4096;
        // Written so that a NaN fails.
        check(is_long ? error >= least && error <= most : error <= tolerance(cases[i].type),
              cases[i].name + " is as the CPU backend has it");
    }
}

} // namespace

int main(int argc, char **argv)
{
    const std::string nodes = argc > 2 ? argv[2] : "";
    if (argc < 5 || (nodes != "all" && nodes != "long")) {
        std::fprintf(stderr, "usage: compare libggml-hyperattn.so all|long LEAST MOST [SEED]\n");
        return 2;
    }
    const uint32_t seed = argc > 5 ? static_cast<uint32_t>(std::strtoul(argv[5], nullptr, 10)) : 1;
    compare(argv[1], nodes, std::atof(argv[3]), std::atof(argv[4]), seed);
    std::printf("compare: %d checks, %d failures\n", checks, failures);
    return failures == 0 ? 0 : 1;
}
