// What the environment says about the method, read once when the backend is loaded.
#ifndef GGML_HYPERATTN_SETTINGS_H
#define GGML_HYPERATTN_SETTINGS_H

#include <hyperattn/hyperattn.h>

// Fills *params with hyperattn's defaults and what HYPERATTN_GGML_METHOD (auto, exact, refined, paper),
// HYPERATTN_GGML_BUDGET and HYPERATTN_GGML_TARGET_ERROR say. False where one of them makes no sense; that is logged.
bool params_from_environment(hyperattn_params *params);

// The name that HYPERATTN_GGML_METHOD has for a method.
const char *method_name(hyperattn_method method);

#endif
