//! Double-precision oracle for attention and the published estimator
