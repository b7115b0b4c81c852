//! Forward and backward calls of long bf16 tensors, timed.

use hyperattn_core::{DType, Params, TensorLayout, bf16};
use hyperattn_cuda::{DeviceBlockMask, DeviceGradients, DeviceTensor, DeviceTensors};
use hyperattn_reference::Generator;

use super::device::{Memory, Stream, cuda};

/// A packed tensor of one batch item.
pub fn packed_tensor(address: u64, heads: i64, rows: i64, dim: i64, dtype: DType) -> DeviceTensor {
    DeviceTensor { address, layout: TensorLayout::contiguous(dtype, [1, heads, rows, dim]) }
}

/// A packed bf16 tensor of normal numbers, which repeat with a long odd period; with its memory.
fn cheap_tensor(numbers: &[u8], heads: i64, n: i64, dim: i64) -> (Memory, DeviceTensor) {
    let bytes = (heads * n * dim * 2) as usize;
    let memory = Memory::filled(bytes, 0);
    memory.write(0, &numbers.iter().copied().cycle().take(bytes.min(numbers.len())).collect::<Vec<u8>>());
    let mut filled = numbers.len().min(bytes);
    while filled < bytes {
        let more = filled.min(bytes - filled);
        cuda!(cuMemcpyDtoD_v2(memory.address() + filled as u64, memory.address(), more));
        filled += more;
    }
    let tensor = packed_tensor(memory.address(), heads, n, dim, DType::BF16);
    (memory, tensor)
}

/// Normal numbers in bf16, as many as a long odd period.
fn normal_numbers() -> Vec<u8> {
    let mut generator = Generator::new(80);
    let normal: Vec<f32> = (0..(1 << 19) + 77).map(|_| generator.normal() as f32).collect();
    normal.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
}

/// A call of bf16 tensors on the device, to be timed.
pub struct Timed {
    _memory: Vec<Memory>,
    tensors: DeviceTensors,
    gradients: DeviceGradients,
    workspace: Memory,
    /// Bytes that the backward call asked for.
    pub needed: usize,
    stream: Stream,
}

impl Timed {
    /// `heads` are those of queries and of keys.
    pub fn new(
        params: &Params,
        heads: [i64; 2],
        n: i64,
        dim: i64,
        block_mask: Option<DeviceBlockMask>,
    ) -> Self {
        let numbers = normal_numbers();
        let [of_queries, of_keys] = heads;
        let mut memory = Vec::new();
        let mut tensor = |heads| {
            let (own, tensor) = cheap_tensor(&numbers, heads, n, dim);
            memory.push(own);
            tensor
        };
        let [q, out, dout, dq] = [(); 4].map(|()| tensor(of_queries));
        let [k, v, dk, dv] = [(); 4].map(|()| tensor(of_keys));
        let lse = Memory::filled((of_queries * n * 4) as usize, 0);
        let tensors = DeviceTensors {
            lse: Some(packed_tensor(lse.address(), of_queries, n, 1, DType::F32)),
            block_mask,
            ..DeviceTensors::new(q, k, v, out)
        };
        memory.push(lse);
        let needed = hyperattn_cuda::backward_workspace(params, &tensors).unwrap().size;
        let of_forward = hyperattn_cuda::forward_workspace(params, &tensors).unwrap().size;
        Timed {
            _memory: memory,
            tensors,
            gradients: DeviceGradients { dout, dlse: None, dq, dk, dv },
            workspace: Memory::filled(of_forward.max(needed), 0),
            needed,
            stream: Stream::new(),
        }
    }

    /// Medians of five, which take turns, after one more.
    fn milliseconds<const COUNT: usize>(&self, bodies: [&dyn Fn(); COUNT]) -> [f32; COUNT] {
        bodies.iter().for_each(|body| body());
        let rounds: Vec<[f32; COUNT]> = (0..5).map(|_| bodies.map(|body| self.stream.time(body))).collect();
        std::array::from_fn(|at| {
            let mut all: Vec<f32> = rounds.iter().map(|round| round[at]).collect();
            all.sort_by(f32::total_cmp);
            all[2]
        })
    }

    fn given(&self) -> Option<(u64, usize)> {
        Some((self.workspace.address(), self.workspace.size()))
    }

    /// Milliseconds of the forward call, which leaves out and lse.
    pub fn forward(&self, params: &Params) -> f32 {
        // SAFETY: tensors and workspace are the device's memory, which outlives the work, as it is waited for.
        let [forward] = self.milliseconds([&|| unsafe {
            hyperattn_cuda::forward(params, &self.tensors, self.given(), self.stream.raw()).unwrap();
        }]);
        forward
    }

    /// Milliseconds of the backward call with each of these.
    pub fn backward<const COUNT: usize>(&self, params: [&Params; COUNT]) -> [f32; COUNT] {
        let (tensors, gradients) = (&self.tensors, &self.gradients);
        let calls = params.map(|params| {
            let (given, stream) = (self.given(), self.stream.raw());
            // SAFETY: as above.
            move || unsafe { hyperattn_cuda::backward(params, tensors, gradients, given, stream).unwrap() }
        });
        self.milliseconds(calls.each_ref().map(|call| call as &dyn Fn()))
    }
}
