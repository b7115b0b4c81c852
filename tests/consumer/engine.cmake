# One engine for each of TARGETS, and a test that runs it.
enable_testing()
foreach(target IN LISTS TARGETS)
    string(REPLACE "::" "_" name "engine_${target}")
    add_executable(${name} ../engine.c ../layer.c ../layer.cpp)
    target_compile_options(${name} PRIVATE -Wall -Wextra -Werror)
    target_link_libraries(${name} PRIVATE ${target} m)
    add_test(NAME ${name} COMMAND ${name})
endforeach()
