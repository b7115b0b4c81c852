// hyperattn.hpp: views from every source, calls against results worked out by hand, errors, thread pools, workspaces, plans.
#include "check.hpp"

#if __has_include(<version>)
#include <version>
#endif

int main()
{
#ifdef HYPERATTN_NO_EXCEPTIONS
    const char *model = "status";
#else
    const char *model = "exceptions";
#endif
#ifdef __cpp_lib_mdspan
    const char *mdspan = "std::mdspan too";
#else
    const char *mdspan = "no std::mdspan here, its members only";
#endif
    check_views();
    check_calls();
    check_threads();
    check_workspace();
    check_plans();
    std::printf("wrapper: C++ %ld, %s: %d checks, %d failures (%s)\n", static_cast<long>(__cplusplus), model, checks,
                failures, mdspan);
    return checks > 0 && failures == 0 ? 0 : 1;
}
