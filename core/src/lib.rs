//! HyperAttention algorithms and CPU kernels, no_std
