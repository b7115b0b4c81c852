//! The C ABI of hyperattn
