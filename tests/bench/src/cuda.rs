//! This library on a GPU, timed by the GPU's own clock.

use std::error::Error;
use std::ffi::c_int;
use std::rc::Rc;

use hyperattn_core::{DType, ErrorKind, Layout, Params, TensorLayout};
use hyperattn_cuda::{
    DeviceGradients, DeviceTensor, DeviceTensors, backward, backward_workspace, forward, forward_workspace,
};

use crate::accuracy::{Accuracy, of_out, of_query_gradient};
use crate::csv::Memory;
use crate::driver::{self, Driver, Event, Memory as DeviceMemory, Stream};
use crate::gradients;
use crate::group::{Ours, Report};
use crate::inputs::Inputs;
use crate::problem::{Pass, Problem, Shape};
use crate::tensor::Tensor;
use crate::timing::{MOST_CALLS, Member};

/// Who computes, as records name it.
pub const IMPLEMENTATION: &str = "cuda";

/// Turns of calls shorter than this begin with one that is not timed. Behind it the timed ones are enqueued
/// while the GPU works, so that their times are the GPU's and not those of the launches.
const SHORT: f64 = 20e-3;

/// Makes every byte of a tensor part of a NaN, whatever its element type.
const NAN_BYTE: u8 = 0xff;

/// The first GPU of the machine.
pub struct Cuda {
    driver: &'static Driver,
    name: String,
    architecture: String,
    // Kept for the life of the process: the context that is current on this thread.
    stream: Stream,
}

impl Cuda {
    /// The GPU, its primary context current on this thread.
    ///
    /// # Errors
    /// Why there is none.
    pub fn find() -> Result<Self, String> {
        let driver = driver::driver()?;
        let ordinal: c_int = driver.first_device()?;
        driver.make_current(ordinal)?;
        let [major, minor] = driver.compute_capability(ordinal)?;
        Ok(Cuda {
            driver,
            name: driver.device_name(ordinal)?,
            architecture: format!("sm_{major}{minor}"),
            stream: Stream::new(driver)?,
        })
    }

    /// Loads the library's code by a small call. `Some` sentence where the library says that this device is none for
    /// it.
    ///
    /// # Errors
    /// Anything else that the call answers.
    pub fn load(&self) -> Result<Option<String>, Box<dyn Error>> {
        let layout = TensorLayout::contiguous(DType::BF16, [1, 1, 64, 64]);
        let tensor = || DeviceMemory::filled(self.driver, bytes(&layout), 0);
        let memory = [tensor()?, tensor()?, tensor()?, tensor()?];
        let [q, k, v, out] =
            memory.each_ref().map(|memory| DeviceTensor { address: memory.address(), layout });
        let tensors = DeviceTensors::new(q, k, v, out);
        let params = Params::default();
        let workspace = Workspace::new(self.driver, forward_workspace(&params, &tensors)?)?;
        // SAFETY: the context is current, the stream its own; the memory lives until the stream has been waited for.
        match unsafe { forward(&params, &tensors, Some(workspace.place()), self.stream.raw()) } {
            Err(error) if error.kind() == ErrorKind::DeviceUnavailable => Ok(Some(error.to_string())),
            result => {
                result?;
                self.stream.synchronize()?;
                Ok(None)
            }
        }
    }

    /// What NVIDIA calls the code that it runs, such as sm_90.
    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    /// One line on the device.
    pub fn describe(&self) -> String {
        format!("{} ({})", self.name, self.architecture)
    }
}

/// Bytes of a packed tensor.
fn bytes(layout: &TensorLayout) -> usize {
    layout.shape.iter().product::<i64>() as usize * layout.dtype.size()
}

/// Scratch memory of a call.
struct Workspace {
    memory: DeviceMemory,
    size: usize,
}

impl Workspace {
    fn new(driver: &'static Driver, need: Layout) -> Result<Self, String> {
        // The driver's memory begins at multiples of 256 bytes at least, and the library asks for no more.
        let memory = DeviceMemory::new(driver, need.size)?;
        assert!(memory.address().is_multiple_of(need.align as u64), "memory of the device is aligned");
        Ok(Workspace { memory, size: need.size })
    }

    fn place(&self) -> (u64, usize) {
        (self.memory.address(), self.size)
    }
}

/// Copies of inputs in the device's memory.
struct Uploaded {
    memory: [DeviceMemory; 3],
    shape: Shape,
}

impl Uploaded {
    fn new(driver: &'static Driver, inputs: &Inputs) -> Result<Self, String> {
        let upload = |at: usize| {
            let bytes = inputs.tensors[at].bytes();
            let memory = DeviceMemory::new(driver, bytes.len())?;
            memory.write(bytes)?;
            Ok::<_, String>(memory)
        };
        Ok(Uploaded { memory: [upload(0)?, upload(1)?, upload(2)?], shape: inputs.shape })
    }
}

/// What a backward call has besides the tensors of the forward.
struct Gradients {
    /// As the oracle reads it.
    dout: Tensor,
    dout_memory: DeviceMemory,
    lse: DeviceMemory,
    lse_layout: TensorLayout,
    /// dq, dk and dv, each laid out as the input that it belongs to.
    outputs: [DeviceMemory; 3],
}

impl Gradients {
    fn new(problem: &Problem, inputs: &Inputs, driver: &'static Driver) -> Result<Self, String> {
        let Shape { batch, heads_q, n_q, .. } = problem.shape;
        let dout = gradients::dout(problem);
        let dout_memory = DeviceMemory::new(driver, dout.bytes().len())?;
        dout_memory.write(dout.bytes())?;
        let lse_layout =
            TensorLayout::contiguous(DType::F32, [batch, heads_q, n_q, 1].map(|extent| extent as i64));
        let unwritten = |layout: &TensorLayout| DeviceMemory::filled(driver, bytes(layout), NAN_BYTE);
        let output = |at: usize| unwritten(inputs.tensors[at].layout());
        Ok(Gradients {
            lse: unwritten(&lse_layout)?,
            outputs: [output(0)?, output(1)?, output(2)?],
            dout,
            dout_memory,
            lse_layout,
        })
    }

    fn lse(&self) -> DeviceTensor {
        DeviceTensor { address: self.lse.address(), layout: self.lse_layout }
    }

    fn tensors(&self, inputs: &Inputs) -> DeviceGradients {
        let output = |at: usize| DeviceTensor {
            address: self.outputs[at].address(),
            layout: *inputs.tensors[at].layout(),
        };
        DeviceGradients {
            dout: DeviceTensor { address: self.dout_memory.address(), layout: *self.dout.layout() },
            dlse: None,
            dq: output(0),
            dk: output(1),
            dv: output(2),
        }
    }
}

/// A problem, ready to run.
pub struct OnCuda<'a> {
    problem: Problem,
    inputs: &'a Inputs,
    cuda: &'a Cuda,
    // Problems of a group share it.
    uploaded: Rc<Uploaded>,
    out: DeviceMemory,
    out_layout: TensorLayout,
    // Of a backward problem.
    gradients: Option<Gradients>,
    workspace: Workspace,
    events: Vec<Event>,
}

impl<'a> OnCuda<'a> {
    /// Copies the inputs, and makes everything else that the calls need: for gradients also the forward's output.
    ///
    /// # Errors
    /// What the library answers to a problem, and a device whose memory is not enough.
    pub fn all(problems: &[(Problem, &'a Inputs)], cuda: &'a Cuda) -> Result<Vec<Self>, Box<dyn Error>> {
        let mut uploads: Vec<Rc<Uploaded>> = Vec::new();
        let mut all = Vec::new();
        for &(problem, inputs) in problems {
            let uploaded = match uploads.iter().find(|uploaded| uploaded.shape == inputs.shape) {
                Some(uploaded) => Rc::clone(uploaded),
                None => {
                    uploads.push(Rc::new(Uploaded::new(cuda.driver, inputs)?));
                    Rc::clone(&uploads[uploads.len() - 1])
                }
            };
            all.push(Self::new(problem, inputs, uploaded, cuda)?);
        }
        Ok(all)
    }

    fn new(
        problem: Problem,
        inputs: &'a Inputs,
        uploaded: Rc<Uploaded>,
        cuda: &'a Cuda,
    ) -> Result<Self, Box<dyn Error>> {
        let out_layout = TensorLayout { dtype: problem.dtype_out, ..*inputs.tensors[0].layout() };
        let out = DeviceMemory::filled(cuda.driver, bytes(&out_layout), NAN_BYTE)?;
        let gradients = match problem.pass {
            Pass::Forward => None,
            Pass::Backward => Some(Gradients::new(&problem, inputs, cuda.driver)?),
        };
        let tensors = tensors(
            inputs,
            &uploaded,
            DeviceTensor { address: out.address(), layout: out_layout },
            gradients.as_ref().map(Gradients::lse),
        );
        let workspace = Workspace::new(cuda.driver, forward_workspace(&problem.params, &tensors)?)?;
        let events = (0..=MOST_CALLS).map(|_| Event::new(cuda.driver)).collect::<Result<_, _>>()?;
        let mut ready =
            OnCuda { problem, inputs, cuda, uploaded, out, out_layout, gradients, workspace, events };
        if problem.pass == Pass::Backward {
            ready.enqueue_forward(&tensors, &ready.workspace)?;
            cuda.stream.synchronize()?;
            ready.workspace = Workspace::new(cuda.driver, backward_workspace(&problem.params, &tensors)?)?;
        }
        // The first call may compile its kernels, which would count as its time.
        ready.enqueue(&tensors)?;
        cuda.stream.synchronize()?;
        Ok(ready)
    }

    fn tensors(&self) -> DeviceTensors {
        let out = DeviceTensor { address: self.out.address(), layout: self.out_layout };
        tensors(self.inputs, &self.uploaded, out, self.gradients.as_ref().map(Gradients::lse))
    }

    /// Enqueues a forward call.
    fn enqueue_forward(&self, tensors: &DeviceTensors, workspace: &Workspace) -> hyperattn_core::Result<()> {
        // SAFETY: the device's context is current and the stream its own. The tensors lie in memory of their size,
        // which lives until the stream has been waited for, as does the workspace; one call follows another in
        // the stream.
        unsafe { forward(&self.problem.params, tensors, Some(workspace.place()), self.cuda.stream.raw()) }
    }

    /// Enqueues the call that is measured.
    fn enqueue(&self, tensors: &DeviceTensors) -> hyperattn_core::Result<()> {
        let Some(gradients) = &self.gradients else {
            return self.enqueue_forward(tensors, &self.workspace);
        };
        let (params, gradients) = (&self.problem.params, gradients.tensors(self.inputs));
        let workspace = Some(self.workspace.place());
        // SAFETY: as above; the gradients, too, lie in memory of their size that lives as long.
        unsafe { backward(params, tensors, &gradients, workspace, self.cuda.stream.raw()) }
    }
}

/// The tensors of a call.
fn tensors(
    inputs: &Inputs,
    uploaded: &Uploaded,
    out: DeviceTensor,
    lse: Option<DeviceTensor>,
) -> DeviceTensors {
    let input = |at: usize| DeviceTensor {
        address: uploaded.memory[at].address(),
        layout: *inputs.tensors[at].layout(),
    };
    DeviceTensors { lse, ..DeviceTensors::new(input(0), input(1), input(2), out) }
}

impl Ours for OnCuda<'_> {
    fn report(&mut self) -> Result<Report, Box<dyn Error>> {
        let Shape { batch, heads_q, .. } = self.inputs.shape;
        let layout = TensorLayout::contiguous(DType::F32, [batch as i64, heads_q as i64, 1, 1]);
        let driver = self.cuda.driver;
        let figures = || DeviceMemory::filled(driver, bytes(&layout), NAN_BYTE);
        let (errors, keys) = (figures()?, figures()?);
        let tensor = |memory: &DeviceMemory| Some(DeviceTensor { address: memory.address(), layout });
        let tensors =
            DeviceTensors { error: tensor(&errors), keys_per_query: tensor(&keys), ..self.tensors() };
        let workspace = Workspace::new(driver, forward_workspace(&self.problem.params, &tensors)?)?;
        self.enqueue_forward(&tensors, &workspace)?;
        self.cuda.stream.synchronize()?;
        let numbers = |memory: &DeviceMemory| -> Result<Vec<f32>, String> {
            let mut bytes = vec![0; bytes(&layout)];
            memory.read(&mut bytes)?;
            Ok(bytes.as_chunks().0.iter().map(|number| f32::from_ne_bytes(*number)).collect())
        };
        Ok(Report::of_heads(&numbers(&keys)?, &numbers(&errors)?))
    }

    fn accuracy(&mut self) -> Result<Accuracy, Box<dyn Error>> {
        let Shape { dtypes, layout, batch, heads_q, n_q, head_dim, .. } = self.inputs.shape;
        let of_queries = [batch, heads_q, n_q, head_dim];
        Ok(match &self.gradients {
            None => {
                let mut out = Tensor::new(self.problem.dtype_out, of_queries, layout);
                self.out.read(out.bytes_mut())?;
                of_out(&self.problem, self.inputs, &out)
            }
            Some(gradients) => {
                let mut dq = Tensor::new(dtypes[0], of_queries, layout);
                gradients.outputs[0].read(dq.bytes_mut())?;
                of_query_gradient(&self.problem, self.inputs, &gradients.dout, &dq)
            }
        })
    }

    fn memory(&self) -> Memory {
        Memory { workspace_bytes: Some(self.workspace.size as u64), ..Memory::default() }
    }

    fn waiting(&self) -> Option<f64> {
        None
    }

    fn peak(&self) -> Option<(&'static str, f64)> {
        None
    }
}

impl Member for OnCuda<'_> {
    fn call(&mut self) -> Result<f64, Box<dyn Error>> {
        Ok(self.calls(1, false)?[0])
    }

    fn calls(&mut self, count: usize, warm_up: bool) -> Result<Vec<f64>, Box<dyn Error>> {
        let (tensors, stream) = (self.tensors(), &self.cuda.stream);
        let enqueue = || self.enqueue(&tensors);
        if warm_up {
            enqueue()?;
        }
        // One event between two calls: the end of one is the beginning of the next.
        let events = &self.events[..=count];
        events[0].record(stream)?;
        for event in &events[1..] {
            enqueue()?;
            event.record(stream)?;
        }
        stream.synchronize()?;
        let seconds = events.windows(2).map(|pair| pair[0].seconds_until(&pair[1]));
        Ok(seconds.collect::<Result<_, _>>()?)
    }

    fn short(&self) -> f64 {
        SHORT
    }
}

impl Drop for OnCuda<'_> {
    fn drop(&mut self) {
        // After an error some calls may be on their way, and their memory goes now.
        let _ = self.cuda.stream.synchronize();
    }
}
