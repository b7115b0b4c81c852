//! What computes.

use std::error::Error;

use hyperattn_core::Kernels;

use crate::cpu::OnCpu;
use crate::cuda::{self, Cuda, OnCuda};
use crate::group::Ours;
use crate::inputs::Inputs;
use crate::problem::Problem;

/// Where the problems of a run are computed.
pub enum Device {
    /// On the processor by these kernels.
    Cpu(&'static Kernels),
    /// On a GPU.
    Cuda(Cuda),
}

impl Device {
    /// Who computes, as records name it.
    pub fn implementation(&self) -> &'static str {
        match self {
            Device::Cpu(_) => "hyperattn",
            Device::Cuda(_) => cuda::IMPLEMENTATION,
        }
    }

    /// The kernels, or the architecture of the GPU.
    pub fn isa(&self) -> &str {
        match self {
            Device::Cpu(kernels) => kernels.isa().name(),
            Device::Cuda(cuda) => cuda.architecture(),
        }
    }

    /// The problems of a group, ready to run on their inputs.
    ///
    /// # Errors
    /// What the library or the device answers.
    pub fn prepare<'a>(
        &'a self,
        problems: &[(Problem, &'a Inputs)],
    ) -> Result<Vec<Box<dyn Ours + 'a>>, Box<dyn Error>> {
        let mut ours: Vec<Box<dyn Ours + 'a>> = Vec::new();
        match self {
            Device::Cpu(kernels) => {
                for &(problem, inputs) in problems {
                    ours.push(Box::new(OnCpu::new(problem, inputs, kernels)?));
                }
            }
            Device::Cuda(cuda) => {
                for problem in OnCuda::all(problems, cuda)? {
                    ours.push(Box::new(problem));
                }
            }
        }
        Ok(ours)
    }
}
