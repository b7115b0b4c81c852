# Builds the source tree that this port lies in, with the cargo that is on PATH.
get_filename_component(SOURCE_PATH "${CURRENT_PORT_DIR}/../../.." ABSOLUTE)
find_program(CARGO cargo HINTS "$ENV{CARGO_HOME}/bin" "$ENV{HOME}/.cargo/bin" REQUIRED)

# One optimised library serves both configurations of a C++ program.
set(VCPKG_BUILD_TYPE release)
set(libraries static)
if(VCPKG_LIBRARY_LINKAGE STREQUAL "dynamic")
    set(libraries shared)
endif()
set(architecture x86_64)
if(VCPKG_TARGET_ARCHITECTURE STREQUAL "arm64")
    set(architecture aarch64)
endif()

vcpkg_execute_required_process(
    COMMAND "${CARGO}" run --quiet --locked --package hyperattn-install --
        --prefix "${CURRENT_PACKAGES_DIR}"
        --libraries "${libraries}"
        --target "${architecture}-unknown-linux-gnu"
        --target-dir "${CURRENT_BUILDTREES_DIR}/cargo"
        --cmakedir "share/${PORT}"
        --licensedir "share/${PORT}"
    WORKING_DIRECTORY "${SOURCE_PATH}"
    LOGNAME "install-${TARGET_TRIPLET}")

vcpkg_fixup_pkgconfig()
vcpkg_install_copyright(FILE_LIST
    "${SOURCE_PATH}/LICENSE-APACHE" "${SOURCE_PATH}/LICENSE-MIT" "${CURRENT_PACKAGES_DIR}/share/${PORT}/THIRD-PARTY")
