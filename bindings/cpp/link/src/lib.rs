//! Builds the static library and compiles C and C++ programs against it
