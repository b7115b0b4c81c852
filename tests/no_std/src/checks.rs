//! The comparisons.

use core::fmt::{self, Write};

use hyperattn_core::{
    BlockMask, Error, ErrorKind, Kernels, Layout, Mask, Method, Params, Residual, Serial, TensorMut,
    TensorRef, Tensors,
};

use crate::console::Console;
use crate::inputs::{self, Buffers, HEAD_DIM, HEADS, LEN, Output, SEED, VALUE_DIM, Workspace};
use crate::reference;

/// f32 inputs, f32 accumulation.
const TOLERANCE: f64 = 5e-6;

/// Blocks of the mask and of sortLSH when it estimates.
const BLOCK: usize = 32;
const BLOCKS: usize = LEN / BLOCK;

/// A comparison does not hold; the console has said which.
pub(crate) struct Failed;

fn failed(sentence: fmt::Arguments<'_>) -> Failed {
    let _ = writeln!(Console, "FAILED: {sentence}");
    Failed
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        failed(format_args!("a valid call was refused: {error}"))
    }
}

/// `value`, unless it reaches the tolerance or is NaN.
fn small(what: &str, value: f64) -> Result<f64, Failed> {
    if value < TOLERANCE {
        return Ok(value);
    }
    Err(failed(format_args!("{what}: {value:.1e} is not below {TOLERANCE:.0e}")))
}

fn compare(what: &str, a: &Output, b: &Output) -> Result<f64, Failed> {
    small(what, reference::relative_error(&a.lse, &b.lse))?;
    small(what, reference::relative_error(&a.out, &b.out))
}

/// Everything, on every kernel table of this machine. Returns how many tables there are.
pub(crate) fn run() -> Result<usize, Failed> {
    // SAFETY: the only call.
    let buffers = unsafe { inputs::buffers() };
    let mut tables = 0;
    for kernels in Kernels::available() {
        refusal(buffers, kernels)?;
        for (name, mask) in [("none", Mask::None), ("causal", Mask::CausalBottomRight)] {
            let exact = exact(buffers, kernels, mask)?;
            one_block(buffers, kernels, mask)?;
            let full = full_block_mask(buffers, kernels, mask)?;
            let _ = writeln!(
                Console,
                "{} mask {name}: EXACT against f64 {exact:.1e}, PAPER with every block against EXACT {full:.1e}",
                kernels.isa().name()
            );
        }
        let estimate = estimate(buffers, kernels, tables == 0)?;
        let _ = writeln!(
            Console,
            "{} mask none: PAPER with blocks of {BLOCK} against EXACT {estimate:.1e} (seed {SEED})",
            kernels.isa().name()
        );
        tables += 1;
    }
    Ok(tables)
}

/// EXACT is the f64 loop.
fn exact(b: &mut Buffers, kernels: &Kernels, mask: Mask) -> Result<f64, Failed> {
    reference::attention(&b.q, &b.k, &b.v, mask != Mask::None, &mut b.reference);
    let params = Params { method: Method::Exact, mask, ..Params::default() };
    forward(&params, None, kernels, (&b.q, &b.k, &b.v), &mut b.exact, &mut b.workspace)?;
    compare("EXACT against the f64 loop", &b.exact, &b.reference)
}

/// PAPER with one block that holds every key is EXACT.
fn one_block(b: &mut Buffers, kernels: &Kernels, mask: Mask) -> Result<(), Failed> {
    let params = Params { block_size: LEN as u32, ..paper(mask) };
    forward(&params, None, kernels, (&b.q, &b.k, &b.v), &mut b.paper, &mut b.workspace)?;
    compare("PAPER with block_size = n against EXACT", &b.paper, &b.exact)?;
    Ok(())
}

/// PAPER with a mask of all blocks is EXACT, by way of the estimator: no key is left to sample.
fn full_block_mask(b: &mut Buffers, kernels: &Kernels, mask: Mask) -> Result<f64, Failed> {
    let mut row_offsets = [0i64; BLOCKS + 1];
    let mut columns = [0i32; BLOCKS * BLOCKS];
    for (i, offset) in row_offsets.iter_mut().enumerate() {
        *offset = (i * BLOCKS) as i64;
    }
    for (i, column) in columns.iter_mut().enumerate() {
        *column = (i % BLOCKS) as i32;
    }
    let blocks = BlockMask {
        query_block: BLOCK,
        key_block: BLOCK,
        num_query_blocks: BLOCKS,
        num_key_blocks: BLOCKS,
        row_offsets: &row_offsets,
        columns: &columns,
        head_stride: 0,
    };
    forward(&paper(mask), Some(blocks), kernels, (&b.q, &b.k, &b.v), &mut b.paper, &mut b.workspace)?;
    compare("PAPER with every block given against EXACT", &b.paper, &b.exact)
}

/// PAPER proper: hashed, sorted, sampled. Codes, order and samples are the same bits on every table, so the
/// tables agree; and the weights of a row add up to 1, which the constant column of v shows.
fn estimate(b: &mut Buffers, kernels: &Kernels, first: bool) -> Result<f64, Failed> {
    let exact = Params { method: Method::Exact, ..Params::default() };
    forward(&exact, None, kernels, (&b.q, &b.k, &b.v), &mut b.exact, &mut b.workspace)?;
    forward(&paper(Mask::None), None, kernels, (&b.q, &b.k, &b.v), &mut b.paper, &mut b.workspace)?;
    if first {
        b.first_table = b.paper;
    }
    compare("PAPER against PAPER of the first table", &b.paper, &b.first_table)?;
    let constant = b.paper.out.chunks(VALUE_DIM).map(|row| (f64::from(row[0]) - 1.0).abs());
    small("PAPER's weights: their sum less 1", constant.fold(0.0, f64::max))?;
    let error = reference::relative_error(&b.paper.out, &b.exact.out);
    if error < 1e-3 {
        return Err(failed(format_args!("PAPER with blocks of {BLOCK} keys gave the result of EXACT")));
    }
    Ok(error)
}

/// A workspace of no bytes is refused with a sentence, made without an allocator.
fn refusal(b: &mut Buffers, kernels: &Kernels) -> Result<(), Failed> {
    let params = Params { method: Method::Exact, ..Params::default() };
    let mut tensors = tensors((&b.q, &b.k, &b.v), &mut b.exact)?;
    match hyperattn_core::forward(&params, &mut tensors, kernels, &Serial, &mut []) {
        Err(error) if error.kind() == ErrorKind::WorkspaceTooSmall && !error.message().is_empty() => Ok(()),
        _ => Err(failed(format_args!("a workspace of no bytes was not refused as too small"))),
    }
}

fn paper(mask: Mask) -> Params {
    Params {
        method: Method::Paper,
        mask,
        residual: Residual::Uniform,
        block_size: BLOCK as u32,
        sample_size: BLOCK as u32,
        min_seq_len: 0,
        seed: SEED,
        ..Params::default()
    }
}

type Inputs<'a> = (&'a [f32], &'a [f32], &'a [f32]);

fn tensors<'a>((q, k, v): Inputs<'a>, to: &'a mut Output) -> Result<Tensors<'a>, Failed> {
    let (heads, len) = (HEADS as i64, LEN as i64);
    let (head_dim, value_dim) = (HEAD_DIM as i64, VALUE_DIM as i64);
    Ok(Tensors {
        q: TensorRef::contiguous(q, [1, heads, len, head_dim])?,
        k: TensorRef::contiguous(k, [1, 1, len, head_dim])?,
        v: TensorRef::contiguous(v, [1, 1, len, value_dim])?,
        out: TensorMut::contiguous(&mut to.out, [1, heads, len, value_dim])?,
        lse: Some(TensorMut::contiguous(&mut to.lse, [1, heads, len, 1])?),
        block_mask: None,
        error: None,
        keys_per_query: None,
        mask: None,
    })
}

/// One call, in a workspace of exactly the size it asks for.
fn forward(
    params: &Params,
    block_mask: Option<BlockMask<'_>>,
    kernels: &Kernels,
    inputs: Inputs<'_>,
    to: &mut Output,
    workspace: &mut Workspace,
) -> Result<(), Failed> {
    let mut tensors = Tensors { block_mask, ..tensors(inputs, to)? };
    let Layout { size, align } =
        hyperattn_core::forward_workspace(params, &tensors.layouts(), kernels, &Serial)?;
    if align > align_of::<Workspace>() {
        return Err(failed(format_args!("the call wants its workspace aligned to {align}")));
    }
    let Some(workspace) = workspace.0.get_mut(..size) else {
        return Err(failed(format_args!("the call wants a workspace of {size} bytes")));
    };
    hyperattn_core::forward(params, &mut tensors, kernels, &Serial, workspace)?;
    Ok(())
}
