//! Loops of multiply-adds on registers, which no attention kernel that is made of them exceeds.
//!
//! Of the benchmark tool these alone must be optimised in tests too, so they are a crate of their own.

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

/// One loop over independent chains of multiply-adds.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// Instruction and vector width.
    pub name: &'static str,
    /// Of all chains, a multiply-add as two.
    pub flops_per_iteration: f64,
    /// Whether it is of use to bf16 inputs only.
    pub only_bf16: bool,
    /// Runs a number of iterations.
    pub run: fn(u64),
}

/// The loops of an instruction set, by its name, that this machine has; at least one.
pub fn kernels(isa: &str) -> Vec<Kernel> {
    // A table of a later version belongs to the family that its name begins with.
    #[cfg(target_arch = "x86_64")]
    let found = x86::kernels(isa);
    #[cfg(target_arch = "aarch64")]
    let found = aarch64::kernels(isa);
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let found = Vec::new();
    if found.is_empty() { vec![portable::KERNEL] } else { found }
}
