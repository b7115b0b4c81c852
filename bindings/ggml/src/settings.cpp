#include "settings.h"

#include "ggml-impl.h"

#include <cstdlib>
#include <cstring>

namespace {

struct named_method {
    const char *name;
    hyperattn_method method;
};

constexpr named_method METHODS[] = {
    {"auto", HYPERATTN_METHOD_AUTO},
    {"exact", HYPERATTN_METHOD_EXACT},
    {"refined", HYPERATTN_METHOD_REFINED},
    {"paper", HYPERATTN_METHOD_PAPER},
};

bool read_method(const char *text, hyperattn_method *method)
{
    for (const named_method &known : METHODS) {
        if (std::strcmp(known.name, text) == 0) {
            *method = known.method;
            return true;
        }
    }
    GGML_LOG_ERROR("hyperattn: HYPERATTN_GGML_METHOD is \"%s\", not auto, exact, refined or paper\n", text);
    return false;
}

bool read_number(const char *variable, const char *text, double least, double most, double *number)
{
    char *end = nullptr;
    const double value = std::strtod(text, &end);
    // Written so that a NaN is refused.
    if (end == text || *end != '\0' || !(value >= least && value <= most)) {
        GGML_LOG_ERROR("hyperattn: %s is \"%s\", not a number from %g to %g\n", variable, text, least, most);
        return false;
    }
    *number = value;
    return true;
}

} // namespace

bool params_from_environment(hyperattn_params *params)
{
    hyperattn_params_init(params, sizeof *params);
    if (const char *text = std::getenv("HYPERATTN_GGML_METHOD")) {
        if (!read_method(text, &params->method))
            return false;
    }
    double number = 0;
    if (const char *text = std::getenv("HYPERATTN_GGML_BUDGET")) {
        if (!read_number("HYPERATTN_GGML_BUDGET", text, 64, 1e9, &number))
            return false;
        params->budget = static_cast<uint32_t>(number);
    }
    if (const char *text = std::getenv("HYPERATTN_GGML_TARGET_ERROR")) {
        if (!read_number("HYPERATTN_GGML_TARGET_ERROR", text, 0, 1e9, &number))
            return false;
        params->target_error = static_cast<float>(number);
    }
    return true;
}

const char *method_name(hyperattn_method method)
{
    for (const named_method &known : METHODS) {
        if (known.method == method)
            return known.name;
    }
    return "unknown";
}
