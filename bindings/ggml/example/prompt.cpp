// Reads a text with a model and prints one line: how fast, how surprised, and how it would go on.
//
//     prompt MODEL.gguf TEXT TOKENS [THREADS [MICRO_BATCH]]
//
// A program like any other that uses llama.cpp: nothing in it knows of hyperattn, GGML_BACKEND_PATH brings it in.
#include "ggml-backend.h"
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int GREEDY_TOKENS = 32;

// One token in so many is scored: enough for a perplexity, at few per cent of the time of a prompt.
constexpr int SCORED_EVERY = 16;

struct deleter {
    void operator()(llama_model *model) const { llama_model_free(model); }
    void operator()(llama_context *context) const { llama_free(context); }
};
template <class T>
using owned = std::unique_ptr<T, deleter>;

struct options {
    const char *model;
    const char *text;
    int tokens;
    int threads;
    int micro_batch;
};

options parse(int argc, char **argv)
{
    if (argc < 4 || argc > 6)
        throw std::runtime_error("usage: prompt MODEL.gguf TEXT TOKENS [THREADS [MICRO_BATCH]]");
    const options parsed = {argv[1], argv[2], std::atoi(argv[3]), argc > 4 ? std::atoi(argv[4]) : 2,
                            argc > 5 ? std::atoi(argv[5]) : 512};
    if (parsed.tokens < 2 || parsed.threads < 1 || parsed.micro_batch < 1)
        throw std::runtime_error("TOKENS must be at least 2, THREADS and MICRO_BATCH at least 1");
    return parsed;
}

std::vector<llama_token> tokenise(const llama_model *model, const char *path, int count)
{
    std::ifstream file(path, std::ios::binary);
    if (!file)
        throw std::runtime_error(std::string("cannot read ") + path);
    std::stringstream text;
    text << file.rdbuf();
    const std::string bytes = text.str();
    std::vector<llama_token> tokens(bytes.size() + 1);
    const int got = llama_tokenize(llama_model_get_vocab(model), bytes.data(), static_cast<int>(bytes.size()),
                                   tokens.data(), static_cast<int>(tokens.size()), true, false);
    if (got < count)
        throw std::runtime_error(std::string(path) + " has too few tokens: " + std::to_string(got));
    tokens.resize(count);
    return tokens;
}

// -ln of the probability that the logits give to a token.
double surprise(const float *logits, int vocabulary, llama_token token)
{
    const float largest = *std::max_element(logits, logits + vocabulary);
    double sum = 0;
    for (int i = 0; i < vocabulary; ++i)
        sum += std::exp(logits[i] - largest);
    return std::log(sum) + largest - logits[token];
}

class reader {
public:
    reader(llama_context *context, int batch_size) : context_(context), batch_(llama_batch_init(batch_size, 0, 1)) {}
    reader(const reader &) = delete;
    reader &operator=(const reader &) = delete;
    ~reader() { llama_batch_free(batch_); }

    void clear() { batch_.n_tokens = 0; }
    void add(llama_token token, int position, bool wanted)
    {
        const int i = batch_.n_tokens++;
        batch_.token[i] = token;
        batch_.pos[i] = position;
        batch_.n_seq_id[i] = 1;
        batch_.seq_id[i][0] = 0;
        batch_.logits[i] = wanted;
    }
    void decode()
    {
        if (llama_decode(context_, batch_) != 0)
            throw std::runtime_error("llama_decode failed");
    }

private:
    llama_context *context_;
    llama_batch batch_;
};

void run(const options &wanted)
{
    owned<llama_model> model(llama_model_load_from_file(wanted.model, llama_model_default_params()));
    if (!model)
        throw std::runtime_error(std::string("cannot load ") + wanted.model);
    const std::vector<llama_token> tokens = tokenise(model.get(), wanted.text, wanted.tokens);
    const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model.get()));

    llama_context_params params = llama_context_default_params();
    params.n_ctx = wanted.tokens + GREEDY_TOKENS;
    params.n_batch = wanted.micro_batch;
    params.n_ubatch = wanted.micro_batch;
    params.n_threads = wanted.threads;
    params.n_threads_batch = wanted.threads;
    owned<llama_context> context(llama_init_from_model(model.get(), params));
    if (!context)
        throw std::runtime_error("cannot make a context");

    reader text(context.get(), wanted.micro_batch);
    double seconds = 0;
    double surprises = 0;
    int scored = 0;
    const int last = wanted.tokens - 1;
    for (int first = 0; first < wanted.tokens; first += wanted.micro_batch) {
        const int count = std::min(wanted.micro_batch, wanted.tokens - first);
        const auto is_scored = [&](int position) { return position % SCORED_EVERY == 0 && position < last; };
        text.clear();
        for (int i = 0; i < count; ++i)
            text.add(tokens[first + i], first + i, is_scored(first + i) || first + i == last);
        const auto started = std::chrono::steady_clock::now();
        text.decode();
        seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
        for (int i = 0; i < count; ++i) {
            if (is_scored(first + i)) {
                surprises += surprise(llama_get_logits_ith(context.get(), i), vocabulary, tokens[first + i + 1]);
                ++scored;
            }
        }
    }
    std::printf("tokens %d seconds %.2f rate %.1f perplexity %.4f next", wanted.tokens, seconds,
                wanted.tokens / seconds, std::exp(surprises / scored));
    for (int i = 0; i < GREEDY_TOKENS; ++i) {
        const float *logits = llama_get_logits_ith(context.get(), -1);
        const llama_token next = static_cast<llama_token>(std::max_element(logits, logits + vocabulary) - logits);
        std::printf(" %d", next);
        text.clear();
        text.add(next, wanted.tokens + i, true);
        text.decode();
    }
    std::printf("\n");
}

} // namespace

int main(int argc, char **argv)
try {
    const options wanted = parse(argc, argv);
    llama_log_set([](ggml_log_level level, const char *text, void *) {
        if (level == GGML_LOG_LEVEL_ERROR)
            std::fputs(text, stderr);
    }, nullptr);
    ggml_backend_load_all();
    llama_backend_init();
    run(wanted);
    llama_backend_free();
    return 0;
} catch (const std::exception &error) {
    std::fprintf(stderr, "prompt: %s\n", error.what());
    return 1;
}
