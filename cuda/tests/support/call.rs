//! One call of any method: on the device, and by the CPU on the same numbers.

use hyperattn_conformance::executors::{Order, Threads};
use hyperattn_conformance::inputs::{DTypes, Inputs};
use hyperattn_conformance::run::{Outcome, Setup};
use hyperattn_core::{BlockMask, DType, Kernels, Params, Result};
use hyperattn_cuda::{DeviceBlockMask, DeviceTensors};

use super::device::{Memory, Stream};
use super::tensor::{Arrangement, Tensor};

/// One call, to be run.
#[derive(Clone, Copy)]
pub struct Call<'a> {
    pub params: &'a Params,
    pub inputs: &'a Inputs,
    pub block_mask: Option<BlockMask<'a>>,
    /// Element type of the output.
    pub out: DType,
    /// How inputs and outputs lie in memory.
    pub arrangements: [Arrangement; 2],
    /// Whether the call receives tensors for its lse, its error and, without a block mask, its keys per query.
    pub all_outputs: bool,
}

/// Bytes behind the workspace, and their value.
const GUARD: [u8; 1024] = [0x5c; 1024];

impl<'a> Call<'a> {
    /// Packed tensors, and an output of the queries' type.
    pub fn new(params: &'a Params, inputs: &'a Inputs) -> Self {
        Call {
            params,
            inputs,
            block_mask: None,
            out: inputs.dtypes.q,
            arrangements: [Arrangement::Packed; 2],
            all_outputs: true,
        }
    }

    /// The CPU's answer, with inputs of these types (which hold the numbers) and an f32 output. Who runs the tasks
    /// changes no bit.
    pub fn on_cpu(&self, dtypes: impl Into<DTypes>) -> Outcome {
        let inputs = Inputs { dtypes: dtypes.into(), ..self.inputs.clone() };
        let setup = Setup::new(Kernels::detect(None), self.params, &inputs);
        let executor = Threads { lanes: 4, threads: 4, order: Order::Forward };
        Setup { block_mask: self.block_mask, estimates: true, executor: &executor, ..setup }.run()
    }

    /// Everything on the device.
    pub fn prepare(&self) -> Prepared {
        let (shape, dtypes) = (&self.inputs.shape, self.inputs.dtypes);
        let input =
            |values: &[f32], extents, dtype| Tensor::new(values, extents, dtype, self.arrangements[0]);
        let output = |extents, dtype| Tensor::poisoned(extents, dtype, self.arrangements[1]);
        let of_heads =
            |wanted: bool| (self.all_outputs && wanted).then(|| output(shape.of_heads(), DType::F32));
        let mut prepared = Prepared {
            params: *self.params,
            q: input(&self.inputs.q, shape.q(), dtypes.q),
            k: input(&self.inputs.k, shape.k(), dtypes.kv),
            v: input(&self.inputs.v, shape.v(), dtypes.kv),
            out: output(shape.out(), self.out),
            lse: self.all_outputs.then(|| output(shape.lse(), DType::F32)),
            error: of_heads(true),
            // Nobody counts the keys of a mask in the device's memory.
            keys_per_query: of_heads(self.block_mask.is_none()),
            block_mask: self.block_mask.as_ref().map(DeviceMask::new),
            workspace: Memory::filled(0, 0),
            needed: 0,
        };
        let need =
            hyperattn_cuda::forward_workspace(&prepared.params, &prepared.tensors()).expect("a legal call");
        assert_eq!(need.align, 256);
        prepared.needed = need.size;
        prepared.workspace = Memory::filled(need.size + GUARD.len(), 0xff);
        prepared.workspace.write(need.size, &GUARD);
        prepared
    }

    /// What the device makes of it.
    pub fn run(&self) -> Outcome {
        let prepared = self.prepare();
        let stream = Stream::new();
        prepared.enqueue(&stream).unwrap_or_else(|error| panic!("{:?}: {error:?}", self.params));
        stream.synchronize();
        prepared.outcome()
    }
}

/// A block mask whose arrays are in the device's memory.
pub struct DeviceMask {
    row_offsets: Memory,
    columns: Memory,
    /// As the library takes it.
    pub mask: DeviceBlockMask,
}

impl DeviceMask {
    /// With the arrays of this one.
    pub fn new(mask: &BlockMask<'_>) -> Self {
        let upload = |bytes: &[u8]| {
            let memory = Memory::filled(bytes.len(), 0);
            memory.write(0, bytes);
            memory
        };
        let offsets: Vec<u8> = mask.row_offsets.iter().flat_map(|offset| offset.to_le_bytes()).collect();
        let columns: Vec<u8> = mask.columns.iter().flat_map(|column| column.to_le_bytes()).collect();
        let (row_offsets, columns) = (upload(&offsets), upload(&columns));
        let mask = DeviceBlockMask {
            query_block: mask.query_block,
            key_block: mask.key_block,
            num_query_blocks: mask.num_query_blocks,
            num_key_blocks: mask.num_key_blocks,
            row_offsets: row_offsets.address(),
            columns: columns.address(),
            head_stride: mask.head_stride,
        };
        DeviceMask { row_offsets, columns, mask }
    }
}

/// A call whose tensors and workspace are on the device.
pub struct Prepared {
    params: Params,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Option<Tensor>,
    error: Option<Tensor>,
    keys_per_query: Option<Tensor>,
    block_mask: Option<DeviceMask>,
    workspace: Memory,
    /// Bytes of workspace that the call asked for.
    pub needed: usize,
}

impl Prepared {
    /// As the library takes them.
    pub fn tensors(&self) -> DeviceTensors {
        DeviceTensors {
            q: self.q.view(),
            k: self.k.view(),
            v: self.v.view(),
            out: self.out.view(),
            lse: self.lse.as_ref().map(Tensor::view),
            block_mask: self.block_mask.as_ref().map(|mask| mask.mask),
            error: self.error.as_ref().map(Tensor::view),
            keys_per_query: self.keys_per_query.as_ref().map(Tensor::view),
        }
    }

    /// The options.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Other inputs of the same shape in the same places.
    pub fn write(&self, inputs: &Inputs) {
        self.q.write(&inputs.q);
        self.k.write(&inputs.k);
        self.v.write(&inputs.v);
    }

    /// Enqueues the call with a workspace that is as large as was asked for.
    pub fn enqueue(&self, stream: &Stream) -> Result<()> {
        let workspace = Some((self.workspace.address(), self.needed));
        // SAFETY: tensors, mask and workspace are the device's memory, which outlives the stream's work: every test
        // waits for it before it drops them.
        unsafe { hyperattn_cuda::forward(&self.params, &self.tensors(), workspace, stream.raw()) }
    }

    /// What the output and lse hold, whatever the other outputs do; the stream has been waited for.
    pub fn out_and_lse(&self) -> [Vec<f32>; 2] {
        [&self.out, self.lse.as_ref().expect("lse is wanted")].map(|tensor| tensor.values(true))
    }

    /// What the outputs hold; the stream has been waited for. Panics where the call wrote behind its workspace or
    /// around an output, or left a part of one as it was.
    pub fn outcome(&self) -> Outcome {
        assert!(
            self.workspace.read(self.needed, GUARD.len()) == GUARD,
            "{:?}: written behind a workspace of {} bytes",
            self.params,
            self.needed
        );
        let of = |tensor: &Option<Tensor>| tensor.as_ref().map_or(Vec::new(), |tensor| tensor.values(true));
        Outcome {
            out: self.out.values(true),
            lse: of(&self.lse),
            error: of(&self.error),
            keys_per_query: of(&self.keys_per_query),
        }
    }
}
