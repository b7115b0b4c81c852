//! Time of one forward call on one thread, on normal inputs:
//! `timing METHOD MASK N HEAD_DIM HEADS [MIN_SEQ_LEN] [REPEATS]`, METHOD exact | paper | auto, MASK none | causal.

use std::time::Instant;

use hyperattn_core::stages::{Purpose, Stream};
use hyperattn_core::{Kernels, Mask, Method, Params, Serial, TensorMut, TensorRef, Tensors};

fn normals(len: usize, head: usize) -> Vec<f32> {
    let stream = Stream::new(1, 2, head, Purpose::Projection);
    (0..len).map(|i| stream.normal(i)).collect()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.len() < 5 {
        return Err("usage: timing METHOD MASK N HEAD_DIM HEADS [MIN_SEQ_LEN] [REPEATS]".into());
    }
    let number = |at: usize, default: usize| args.get(at).map_or(Ok(default), |text| text.parse());
    let (n, head_dim, heads) = (number(2, 0)?, number(3, 0)?, number(4, 0)?);
    let params = Params {
        method: match args[0].as_str() {
            "exact" => Method::Exact,
            "paper" => Method::Paper,
            _ => Method::Auto,
        },
        mask: if args[1] == "causal" { Mask::CausalBottomRight } else { Mask::None },
        min_seq_len: number(5, 4096)?,
        ..Params::default()
    };
    let len = heads * n * head_dim;
    let (q, k, v) = (normals(len, 0), normals(len, 1), normals(len, 2));
    let mut out = vec![0f32; len];
    let shape = [1, heads as i64, n as i64, head_dim as i64];
    let mut tensors = Tensors {
        q: TensorRef::contiguous(&q, shape)?,
        k: TensorRef::contiguous(&k, shape)?,
        v: TensorRef::contiguous(&v, shape)?,
        out: TensorMut::contiguous(&mut out, shape)?,
        lse: None,
        block_mask: None,
    };
    for kernels in Kernels::available() {
        let need = hyperattn_core::forward_workspace(&params, &tensors.layouts(), kernels, &Serial)?;
        let mut buffer = vec![0u8; need.size + need.align];
        let start = buffer.as_ptr().align_offset(need.align);
        let mut times: Vec<f64> = Vec::new();
        for _ in 0..number(6, 3)? {
            let clock = Instant::now();
            hyperattn_core::forward(&params, &mut tensors, kernels, &Serial, &mut buffer[start..])?;
            times.push(clock.elapsed().as_secs_f64());
        }
        times.sort_by(f64::total_cmp);
        let pairs = (heads * n * n) as f64 / if params.mask == Mask::None { 1.0 } else { 2.0 };
        println!(
            "{:7} {:9.3} ms median, {:9.3} best; {:8.1} GFLOP/s of exact attention's work",
            kernels.isa().name(),
            times[times.len() / 2] * 1e3,
            times[0] * 1e3,
            4.0 * pairs * head_dim as f64 / times[0] * 1e-9
        );
    }
    Ok(())
}
