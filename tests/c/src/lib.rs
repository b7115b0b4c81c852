//! C and C++ programs linked to the real static library
