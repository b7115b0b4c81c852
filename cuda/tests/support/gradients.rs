//! A backward call: on the device, and by the CPU on the same numbers.

use hyperattn_conformance::executors::{Order, Threads};
use hyperattn_conformance::inputs::DTypes;
use hyperattn_conformance::run::Workspace;
use hyperattn_conformance::storage;
use hyperattn_core::{
    DType, Division, Gradients, Kernels, Method, Result, TensorMut, TensorRef, Tensors, backward,
    backward_workspace,
};
use hyperattn_cuda::{DeviceGradients, DeviceTensors};
use hyperattn_reference::Generator;

use super::call::{Call, Prepared};
use super::device::{Memory, Stream};
use super::graph::Graph;
use super::tensor::{Arrangement, Tensor, rounded};

/// One backward call, to be run after its forward.
#[derive(Clone, Copy)]
pub struct BackwardCall<'a> {
    /// The forward call; its outputs are the backward's inputs.
    pub forward: Call<'a>,
    /// How both are divided.
    pub division: Division<'a>,
    /// Element type of dout.
    pub dout: DType,
    /// Element types of dq, and of dk and dv.
    pub gradients: [DType; 2],
    /// How dq, dk and dv lie in memory.
    pub arrangement: Arrangement,
    /// Whether the loss depends on lse too.
    pub of_lse: bool,
    pub seed: u64,
}

/// dq, dk and dv in packed order.
pub type Found = [Vec<f32>; 3];

const NAMES: [&str; 3] = ["dq", "dk", "dv"];

impl<'a> BackwardCall<'a> {
    /// Gradients of the types of what they belong to, packed.
    pub fn new(forward: Call<'a>, seed: u64) -> Self {
        let dtypes = forward.inputs.dtypes;
        BackwardCall {
            forward,
            division: Division::default(),
            dout: dtypes.q,
            gradients: [dtypes.q, dtypes.kv],
            arrangement: Arrangement::Packed,
            of_lse: true,
            seed,
        }
    }

    /// Normal gradients of out and lse.
    pub fn losses(&self) -> [Vec<f32>; 2] {
        let shape = &self.forward.inputs.shape;
        let mut generator = Generator::new(self.seed);
        let rows = shape.batch * shape.heads_q * shape.n_q;
        let mut normal = |len: usize| -> Vec<f32> { (0..len).map(|_| generator.normal() as f32).collect() };
        [rounded(&normal(rows * shape.value_dim), self.dout), normal(rows)]
    }

    /// Runs the forward and puts everything for the backward on the device.
    pub fn prepare(&self) -> PreparedBackward<'a> {
        let (forward, division) = (self.forward.prepare(), self.division);
        let (params, stream) = (forward.params(), Stream::new());
        let tensors = DeviceTensors { error: None, keys_per_query: None, ..forward.tensors() };
        // SAFETY: all tensors are the device's memory, which outlives the work, as it is waited for.
        unsafe { hyperattn_cuda::forward_divided(params, &division, &tensors, None, stream.raw()) }
            .expect("a legal call");
        stream.synchronize();
        let shape = &self.forward.inputs.shape;
        let [dout, dlse] = self.losses();
        let [of_queries, of_keys] = self.gradients;
        let given = |values: &[f32], extents, dtype| {
            Tensor::new(values, extents, dtype, self.forward.arrangements[0])
        };
        let wanted = |extents, dtype| Tensor::poisoned(extents, dtype, self.arrangement);
        let need = hyperattn_cuda::backward_divided_workspace(self.forward.params, &division, &tensors)
            .unwrap_or_else(|error| panic!("{:?}: {error:?}", self.forward.params));
        assert_eq!(need.align, 256);
        let workspace = Memory::filled(need.size + GUARD.len(), 0xff);
        workspace.write(need.size, &GUARD);
        PreparedBackward {
            forward,
            division,
            dout: given(&dout, shape.out(), self.dout),
            dlse: self.of_lse.then(|| given(&dlse, shape.lse(), DType::F32)),
            gradients: [
                wanted(shape.q(), of_queries),
                wanted(shape.k(), of_keys),
                wanted(shape.v(), of_keys),
            ],
            workspace,
            needed: need.size,
        }
    }

    /// What the CPU makes of the numbers that are on the device.
    pub fn on_cpu(&self, prepared: &PreparedBackward<'_>) -> Found {
        let (inputs, shape) = (self.forward.inputs, &self.forward.inputs.shape);
        let [mut out, mut lse] = prepared.forward.out_and_lse();
        let [dout, dlse] = self.losses();
        let mut found = [&inputs.q, &inputs.k, &inputs.v].map(|values| vec![f32::NAN; values.len()]);
        let [dq, dk, dv] = &mut found;
        let read = |values, extents| TensorRef::contiguous(values, extents).expect("as many values");
        // Which keys REFINED meets depends on the types.
        let typed = |values: &[f32], extents, dtype| {
            storage::Tensor::new(values, extents, dtype, storage::Arrangement::Packed, f32::NAN)
        };
        let DTypes { q: of_queries, kv: of_keys } = inputs.dtypes;
        let [mut q, mut k, mut v] = [
            typed(&inputs.q, shape.q(), of_queries),
            typed(&inputs.k, shape.k(), of_keys),
            typed(&inputs.v, shape.v(), of_keys),
        ];
        let tensors = Tensors {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            out: TensorMut::contiguous(&mut out, shape.out()).expect("as many values"),
            lse: Some(TensorMut::contiguous(&mut lse, shape.lse()).expect("as many values")),
            block_mask: self.forward.block_mask,
            error: None,
            keys_per_query: None,
            mask: None,
        };
        let mut gradients = Gradients {
            dout: read(&dout, shape.out()),
            dlse: self.of_lse.then(|| read(&dlse, shape.lse())),
            dq: TensorMut::contiguous(dq, shape.q()).expect("as many values"),
            dk: TensorMut::contiguous(dk, shape.k()).expect("as many values"),
            dv: TensorMut::contiguous(dv, shape.v()).expect("as many values"),
        };
        let executor = Threads { lanes: 4, threads: 4, order: Order::Forward };
        let (params, kernels, division) = (self.forward.params, Kernels::detect(None), self.division);
        let layout = backward_workspace(params, &division, &tensors.layouts(), kernels, &executor)
            .expect("a legal call");
        let mut workspace = Workspace::new(layout, |_| 0xFF);
        backward(params, &division, &tensors, &mut gradients, kernels, &executor, workspace.exact())
            .expect("a legal call");
        found
    }

    /// Runs both, and compares them.
    pub fn check(&self) {
        let prepared = self.prepare();
        let found = prepared.run();
        self.compare(&prepared, &found, &self.on_cpu(&prepared));
    }

    /// Prints the relative error of each gradient, and asserts that it is within the rounding errors of the types.
    pub fn compare(&self, prepared: &PreparedBackward<'_>, found: &Found, expected: &Found) {
        let errors = [0, 1, 2].map(|at| relative_error(&found[at], &expected[at], self.cancelled(at)));
        let selection = self.selection(prepared);
        let tolerances = [0, 1, 2].map(|at| self.tolerance(self.gradients[at.min(1)]) + selection);
        let Call { params, inputs, .. } = self.forward;
        println!(
            "{:?} {:?} {:?}/{:?}/{:?} seed {}: dq {:.1e} dk {:.1e} dv {:.1e}, allowed {:.1e} {:.1e}",
            params.method,
            params.mask,
            inputs.shape,
            inputs.dtypes,
            self.dout,
            self.seed,
            errors[0],
            errors[1],
            errors[2],
            tolerances[0],
            tolerances[1]
        );
        for at in 0..3 {
            // A NaN passes no bound.
            assert!(
                errors[at] <= tolerances[at],
                "{params:?}, {:?}, {:?}: {} is {:e} off, {:e} is allowed",
                inputs.shape,
                inputs.dtypes,
                NAMES[at],
                errors[at],
                tolerances[at]
            );
        }
    }

    /// Largest Frobenius error of a gradient of this type. Two results in f32 differ by rounding errors of sums and of
    /// exponentials of large logits. The 16-bit kernels round shares and slopes of pairs, each to within half a step,
    /// independently of each other, and the result; bf16 sums of keys also after each pass of PAPER. An error that is
    /// spread over half a step is 0.58 of it on average, and those of two roundings of pairs, m passes and the result
    /// together sqrt(3 + m) times that: less than the 2.5 half steps of 16-bit gradients for up to 15 passes.
    fn tolerance(&self, of_gradient: DType) -> f64 {
        let half_step = |dtype| match dtype {
            DType::F32 => 0.0,
            DType::F16 => 2f64.powi(-11),
            DType::BF16 => 2f64.powi(-8),
        };
        let dtypes = self.forward.inputs.dtypes;
        let pairs = if dtypes.q == dtypes.kv && self.dout == dtypes.kv { half_step(dtypes.kv) } else { 0.0 };
        3e-5 + 1.5 * pairs + half_step(of_gradient)
    }

    /// What may be off besides where REFINED weighs blocks and keys in numbers that are rounded differently: a key near
    /// the edge is met on one side and left to its block on the other. The outputs differ by that too, and a gradient of
    /// theirs by a few times as much at most.
    fn selection(&self, prepared: &PreparedBackward) -> f64 {
        if self.forward.params.method != Method::Refined {
            return 0.0;
        }
        let of_cpu = self.forward.on_cpu(self.forward.inputs.dtypes);
        5.0 * relative_error(&prepared.forward.out_and_lse()[0], &of_cpu.out, 0.0)
    }

    /// Rounding errors in f32 that are left where slopes cancel: of sums of head_dim products of numbers of this size.
    fn cancelled(&self, at: usize) -> f64 {
        let (inputs, [dout, _]) = (self.forward.inputs, self.losses());
        let other = [&inputs.k, &inputs.q, &inputs.q][at];
        let largest = |values: &[f32]| values.iter().fold(0f64, |most, &x| most.max(f64::from(x.abs())));
        2e-7 * norm(dout.iter().map(|&x| f64::from(x))) * largest(&inputs.v) * largest(other)
    }
}

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

fn relative_error(found: &[f32], expected: &[f32], cancelled: f64) -> f64 {
    assert_eq!(found.len(), expected.len());
    let difference = norm(found.iter().zip(expected).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let whole = norm(expected.iter().map(|&x| f64::from(x)));
    if difference <= cancelled { 0.0 } else { difference / whole }
}

/// Bytes behind the workspace, and their value.
const GUARD: [u8; 1024] = [0x5c; 1024];

/// A backward call whose tensors and workspace are on the device.
pub struct PreparedBackward<'a> {
    pub forward: Prepared,
    division: Division<'a>,
    dout: Tensor,
    dlse: Option<Tensor>,
    gradients: [Tensor; 3],
    workspace: Memory,
    /// Bytes of workspace that the call asked for.
    pub needed: usize,
}

impl PreparedBackward<'_> {
    /// As the library takes them.
    pub fn gradients(&self) -> DeviceGradients {
        let [dq, dk, dv] = self.gradients.each_ref().map(Tensor::view);
        DeviceGradients { dout: self.dout.view(), dlse: self.dlse.as_ref().map(Tensor::view), dq, dk, dv }
    }

    /// Other gradients of out and lse.
    pub fn write_losses(&self, dout: &[f32], dlse: &[f32]) {
        self.dout.write(dout);
        self.dlse.as_ref().expect("a loss of lse").write(dlse);
    }

    /// Enqueues the call with a workspace that is as large as was asked for.
    pub fn enqueue(&self, stream: &Stream) -> Result<()> {
        let workspace = Some((self.workspace.address(), self.needed));
        // SAFETY: all tensors and the workspace are the device's memory, which outlives the stream's work: every test
        // waits for it before it drops them.
        unsafe {
            hyperattn_cuda::backward_divided(
                self.forward.params(),
                &self.division,
                &self.forward.tensors(),
                &self.gradients(),
                workspace,
                stream.raw(),
            )
        }
    }

    /// Runs the call.
    pub fn run(&self) -> Found {
        let stream = Stream::new();
        self.enqueue(&stream).unwrap_or_else(|error| panic!("{:?}: {error:?}", self.forward.params()));
        stream.synchronize();
        self.found()
    }

    /// Asserts that runs and replays of a graph leave the same bits. The first call of these kernels may be the captured one.
    pub fn check_bits(&self) {
        let stream = Stream::new();
        let graph = Graph::capture(&stream, || self.enqueue(&stream).unwrap());
        graph.launch(&stream);
        let first = self.found();
        assert!(first == self.run());
        graph.launch(&stream);
        assert!(first == self.found());
    }

    /// What the gradients hold. Panics where the call wrote behind its workspace or around a gradient, or left a part
    /// of one as it was.
    pub fn found(&self) -> Found {
        assert!(
            self.workspace.read(self.needed, GUARD.len()) == GUARD,
            "{:?}: written behind a workspace of {} bytes",
            self.forward.params(),
            self.needed
        );
        self.gradients.each_ref().map(|gradient| gradient.values(true))
    }
}
