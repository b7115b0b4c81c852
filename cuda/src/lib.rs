//! HyperAttention on CUDA
