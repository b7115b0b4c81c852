/* Takes the address of every function that the header declares: each is declared, and each is in the archive.
 * A test compares this list with the header. */
#include <hyperattn/hyperattn.h>
#include <stdio.h>
#include <stdlib.h>

typedef void (*function)(void);
typedef struct symbol {
    const char *name;
    function address;
} symbol;

#define SYMBOL(name) {#name, (function)name}

static const symbol symbols[] = {
    SYMBOL(hyperattn_version),
    SYMBOL(hyperattn_abi_version),
    SYMBOL(hyperattn_version_string),
    SYMBOL(hyperattn_cpu_isa),
    SYMBOL(hyperattn_has_feature),
    SYMBOL(hyperattn_status_string),
    SYMBOL(hyperattn_last_error),
    SYMBOL(hyperattn_tensor_bhsd),
    SYMBOL(hyperattn_tensor_bshd),
    SYMBOL(hyperattn_params_init),
    SYMBOL(hyperattn_forward_workspace),
    SYMBOL(hyperattn_forward),
    SYMBOL(hyperattn_backward_workspace),
    SYMBOL(hyperattn_backward),
    SYMBOL(hyperattn_merge),
    SYMBOL(hyperattn_plan_create),
    SYMBOL(hyperattn_plan_destroy),
    SYMBOL(hyperattn_plan_workspace),
    SYMBOL(hyperattn_plan_run),
    SYMBOL(hyperattn_plan_task_count),
    SYMBOL(hyperattn_plan_task_workspace),
    SYMBOL(hyperattn_plan_run_tasks),
    SYMBOL(hyperattn_diagnose),
    SYMBOL(hyperattn_cuda_forward_workspace),
    SYMBOL(hyperattn_cuda_forward),
    SYMBOL(hyperattn_cuda_backward_workspace),
    SYMBOL(hyperattn_cuda_backward),
    SYMBOL(hyperattn_cuda_plan_create),
    SYMBOL(hyperattn_cuda_plan_destroy),
    SYMBOL(hyperattn_cuda_plan_workspace),
    SYMBOL(hyperattn_cuda_plan_run),
};

int main(void)
{
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i += 1) {
        /* Through a volatile object: the compiler may otherwise take it for granted that it is not NULL. */
        volatile function address = symbols[i].address;
        printf("%s\n", symbols[i].name);
        if (address == NULL) {
            return EXIT_FAILURE;
        }
    }
    return EXIT_SUCCESS;
}
