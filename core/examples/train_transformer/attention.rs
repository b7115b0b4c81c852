//! Causal attention by the library: the two calls that a model needs, and what they need.

use hyperattn_core::{
    Division, Gradients, Kernels, Layout, Params, Result, Serial, TensorMut, TensorRef, Tensors, backward,
    backward_workspace, forward, forward_workspace,
};

/// What the forward read and wrote; the backward needs nothing else. Queries, keys, values and outputs are the rows of
/// all tokens, heads side by side in each: `[batch, tokens, heads, head_dim]`.
pub struct Attended {
    /// Queries.
    pub q: Vec<f32>,
    /// Keys.
    pub k: Vec<f32>,
    /// Values.
    pub v: Vec<f32>,
    /// What the layer returns.
    pub out: Vec<f32>,
    /// Log-sum-exp, `[batch, tokens, heads]`.
    lse: Vec<f32>,
}

/// A method with its options, for sequences of one length.
pub struct Attention {
    params: Params,
    batch: usize,
    tokens: usize,
    heads: usize,
    head_dim: usize,
    kernels: &'static Kernels,
    workspace: Vec<u8>,
}

impl Attention {
    /// `shape` is batch, tokens, heads and head_dim.
    pub fn new(params: Params, shape: [usize; 4]) -> Self {
        let [batch, tokens, heads, head_dim] = shape;
        let kernels = Kernels::detect(None);
        Attention { params, batch, tokens, heads, head_dim, kernels, workspace: Vec::new() }
    }

    /// Draws other random numbers from here on. A forward and its backward need the same.
    pub fn reseed(&mut self, seed: u64) {
        self.params.seed = seed;
    }

    /// Attention in layer number `layer`.
    pub fn forward(&mut self, layer: usize, [q, k, v]: [Vec<f32>; 3]) -> Result<Attended> {
        let out = vec![0.0; q.len()];
        let lse = vec![0.0; q.len() / self.head_dim];
        let mut attended = Attended { q, k, v, out, lse };
        let params = self.params_of(layer);
        let mut tensors = self.tensors(&mut attended)?;
        let layout = forward_workspace(&params, &tensors.layouts(), self.kernels, &Serial)?;
        let workspace = reserve(&mut self.workspace, layout);
        forward(&params, &mut tensors, self.kernels, &Serial, workspace)?;
        Ok(attended)
    }

    /// The gradients with respect to q, k and v, from `dout`, that with respect to out.
    pub fn backward(&mut self, layer: usize, attended: &mut Attended, dout: &[f32]) -> Result<[Vec<f32>; 3]> {
        let mut results = [(); 3].map(|()| vec![0.0; dout.len()]);
        let [dq, dk, dv] = &mut results;
        let (shape, stride) = self.view(self.head_dim);
        let mut gradients = Gradients {
            dout: TensorRef::new(dout, shape, stride)?,
            dlse: None,
            dq: TensorMut::new(dq, shape, stride)?,
            dk: TensorMut::new(dk, shape, stride)?,
            dv: TensorMut::new(dv, shape, stride)?,
        };
        let (params, division) = (self.params_of(layer), Division::default());
        let tensors = self.tensors(attended)?;
        let layout = backward_workspace(&params, &division, &tensors.layouts(), self.kernels, &Serial)?;
        let workspace = reserve(&mut self.workspace, layout);
        backward(&params, &division, &tensors, &mut gradients, self.kernels, &Serial, workspace)?;
        Ok(results)
    }

    /// Layers draw from streams of their own.
    fn params_of(&self, layer: usize) -> Params {
        Params { offset: layer as u64, ..self.params }
    }

    fn tensors<'a>(&self, attended: &'a mut Attended) -> Result<Tensors<'a>> {
        let (shape, stride) = self.view(self.head_dim);
        let (lse_shape, lse_stride) = self.view(1);
        Ok(Tensors {
            q: TensorRef::new(&attended.q, shape, stride)?,
            k: TensorRef::new(&attended.k, shape, stride)?,
            v: TensorRef::new(&attended.v, shape, stride)?,
            out: TensorMut::new(&mut attended.out, shape, stride)?,
            lse: Some(TensorMut::new(&mut attended.lse, lse_shape, lse_stride)?),
            block_mask: None,
            error: None,
            keys_per_query: None,
            mask: None,
        })
    }

    /// Extents and strides of `[batch, heads, tokens, dim]` in memory of `[batch, tokens, heads, dim]`.
    fn view(&self, dim: usize) -> ([i64; 4], [i64; 4]) {
        let shape = [self.batch, self.heads, self.tokens, dim];
        let stride = [self.tokens * self.heads * dim, dim, self.heads * dim, 1];
        (shape.map(|extent| extent as i64), stride.map(|step| step as i64))
    }
}

/// An aligned stretch of `memory`, which grows when it is too small.
fn reserve(memory: &mut Vec<u8>, layout: Layout) -> &mut [u8] {
    if memory.len() < layout.size + layout.align {
        memory.resize(layout.size + layout.align, 0);
    }
    let start = memory.as_ptr().align_offset(layout.align);
    &mut memory[start..][..layout.size]
}
