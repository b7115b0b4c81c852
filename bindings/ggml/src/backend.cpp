// The tables of functions through which ggml finds the backend: one device of type ACCEL in the CPU's memory.

#include "attention.h"
#include "settings.h"
#include "threads.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#include <cstdio>
#include <cstring>
#include <new>

namespace {

constexpr const char *NAME = "hyperattn";

// The settings of the process, written once when the backend is registered.
struct device_context {
    hyperattn_params params;
    char description[128];
};

struct backend_context {
    const hyperattn_params *params;
    threads team;
    attention_memory memory;
};

// ---------------------------------------------------------------------------------------------------------- Backend

const char *backend_name(ggml_backend_t)
{
    return NAME;
}

void backend_free(ggml_backend_t backend)
{
    delete static_cast<backend_context *>(backend->context);
    delete backend;
}

ggml_status backend_graph_compute(ggml_backend_t backend, ggml_cgraph *graph)
{
    backend_context &context = *static_cast<backend_context *>(backend->context);
    for (int i = 0; i < graph->n_nodes; ++i) {
        const ggml_tensor *node = graph->nodes[i];
        // Views among the nodes are nothing to compute.
        if ((node->flags & GGML_TENSOR_FLAG_COMPUTE) == 0 || node->op != GGML_OP_FLASH_ATTN_EXT)
            continue;
        const ggml_status status = attention_compute(node, *context.params, context.team, context.memory);
        if (status != GGML_STATUS_SUCCESS)
            return status;
    }
    return GGML_STATUS_SUCCESS;
}

// What programs find under the name "ggml_backend_set_n_threads".
void backend_set_n_threads(ggml_backend_t backend, int n_threads)
{
    static_cast<backend_context *>(backend->context)->team.set_count(n_threads);
}

ggml_backend_i backend_functions()
{
    ggml_backend_i functions = {};
    functions.get_name = backend_name;
    functions.free = backend_free;
    functions.graph_compute = backend_graph_compute;
    return functions;
}

ggml_guid_t backend_guid()
{
    static ggml_guid guid = {0x68, 0x79, 0x70, 0x65, 0x72, 0x61, 0x74, 0x74,
                             0x6e, 0x2d, 0x67, 0x67, 0x6d, 0x6c, 0x00, 0x01};
    return &guid;
}

// ----------------------------------------------------------------------------------------------------------- Device

const char *device_name(ggml_backend_dev_t)
{
    return NAME;
}

const char *device_description(ggml_backend_dev_t device)
{
    return static_cast<const device_context *>(device->context)->description;
}

void device_memory(ggml_backend_dev_t, size_t *free, size_t *total)
{
    *free = 0;
    *total = 0;
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t)
{
    return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

void device_props(ggml_backend_dev_t device, ggml_backend_dev_props *props)
{
    *props = {};
    props->name = device_name(device);
    props->description = device_description(device);
    props->type = device_type(device);
    device_memory(device, &props->memory_free, &props->memory_total);
}

ggml_backend_t device_init_backend(ggml_backend_dev_t device, const char *)
{
    backend_context *context = new (std::nothrow) backend_context;
    ggml_backend *backend = new (std::nothrow) ggml_backend;
    if (context == nullptr || backend == nullptr) {
        delete context;
        delete backend;
        return nullptr;
    }
    context->params = &static_cast<const device_context *>(device->context)->params;
    *backend = {};
    backend->guid = backend_guid();
    backend->iface = backend_functions();
    backend->device = device;
    backend->context = context;
    return backend;
}

// The scheduler moves a node from the CPU backend only to one with the same type of buffer.
ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t)
{
    return ggml_backend_cpu_buffer_type();
}

bool device_supports_op(ggml_backend_dev_t, const ggml_tensor *node)
{
    return attention_supports(node);
}

bool device_supports_buffer_type(ggml_backend_dev_t, ggml_backend_buffer_type_t type)
{
    return ggml_backend_buft_is_host(type);
}

ggml_backend_device_i device_functions()
{
    ggml_backend_device_i functions = {};
    functions.get_name = device_name;
    functions.get_description = device_description;
    functions.get_memory = device_memory;
    functions.get_type = device_type;
    functions.get_props = device_props;
    functions.init_backend = device_init_backend;
    functions.get_buffer_type = device_buffer_type;
    functions.supports_op = device_supports_op;
    functions.supports_buft = device_supports_buffer_type;
    return functions;
}

// --------------------------------------------------------------------------------------------------------- Registry

const char *registry_name(ggml_backend_reg_t)
{
    return NAME;
}

size_t registry_device_count(ggml_backend_reg_t)
{
    return 1;
}

ggml_backend_dev_t registry_device(ggml_backend_reg_t registry, size_t)
{
    static ggml_backend_device device = {device_functions(), registry, registry->context};
    return &device;
}

void *registry_function(ggml_backend_reg_t, const char *name)
{
    if (std::strcmp(name, "ggml_backend_set_n_threads") == 0)
        return reinterpret_cast<void *>(backend_set_n_threads);
    return nullptr;
}

ggml_backend_reg make_registry(device_context *context)
{
    ggml_backend_reg registry = {};
    registry.api_version = GGML_BACKEND_API_VERSION;
    registry.iface.get_name = registry_name;
    registry.iface.get_device_count = registry_device_count;
    registry.iface.get_device = registry_device;
    registry.iface.get_proc_address = registry_function;
    registry.context = context;
    return registry;
}

// NULL where the settings or the library are not right; the program then goes on without the backend.
ggml_backend_reg_t register_backend()
{
    static device_context context;
    if (hyperattn_abi_version() != HYPERATTN_ABI_VERSION) {
        GGML_LOG_ERROR("hyperattn: compiled against another version than the library's, %s\n",
                       hyperattn_version_string());
        return nullptr;
    }
    if (!params_from_environment(&context.params))
        return nullptr;
    std::snprintf(context.description, sizeof context.description, "hyperattn %s, %s, method %s",
                  hyperattn_version_string(), hyperattn_cpu_isa(), method_name(context.params.method));
    static ggml_backend_reg registry = make_registry(&context);
    return &registry;
}

} // namespace

GGML_BACKEND_DL_IMPL(register_backend)
