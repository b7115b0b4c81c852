//! Exact attention against the estimator on generated inputs: time and error.
use hyperattn_core::{Kernels, Layout, Mask, Method, Params, Serial, TensorMut, TensorRef, Tensors, stages};
use std::time::Instant;

fn normals(n: usize, head: usize) -> Vec<f32> {
    let stream = stages::Stream::new(1, 2, head, stages::Purpose::Projection);
    (0..n).map(|i| stream.normal(i)).collect()
}

fn main() -> Result<(), hyperattn_core::Error> {
    let args: Vec<String> = std::env::args().collect();
    let n: usize = args.get(1).map_or(4096, |x| x.parse().unwrap());
    let d: usize = args.get(2).map_or(64, |x| x.parse().unwrap());
    let heads = args.get(3).map_or(1, |x| x.parse().unwrap());
    let (q, k, v) = (normals(heads * n * d, 0), normals(heads * n * d, 1), normals(heads * n * d, 2));
    let shape = [1, heads as i64, n as i64, d as i64];
    for kernels in Kernels::available() {
        for mask in [Mask::None, Mask::CausalBottomRight] {
            for method in [Method::Exact, Method::Paper] {
                let mut out = vec![0f32; heads * n * d];
                let mut tensors = Tensors {
                    q: TensorRef::contiguous(&q, shape)?,
                    k: TensorRef::contiguous(&k, shape)?,
                    v: TensorRef::contiguous(&v, shape)?,
                    out: TensorMut::contiguous(&mut out, shape)?,
                    lse: None,
                    block_mask: None,
                };
                let params = Params {
                    method,
                    mask,
                    min_seq_len: args.get(4).map_or(1024, |x| x.parse().unwrap()),
                    ..Params::default()
                };
                let Layout { size, align } =
                    hyperattn_core::forward_workspace(&params, &tensors.layouts(), kernels, &Serial)?;
                let mut workspace = vec![0u8; size + align];
                let start = workspace.as_ptr().align_offset(align);
                let mut best = f64::MAX;
                for _ in 0..3 {
                    let clock = Instant::now();
                    hyperattn_core::forward(
                        &params,
                        &mut tensors,
                        kernels,
                        &Serial,
                        &mut workspace[start..],
                    )?;
                    best = best.min(clock.elapsed().as_secs_f64());
                }
                let pairs = (heads * n * n) as f64 / if mask == Mask::None { 1.0 } else { 2.0 };
                println!(
                    "{kernels:?} {mask:?} {method:?}: {:.2} ms, {:.1} GFLOP/s of exact work",
                    best * 1e3,
                    4.0 * pairs * d as f64 / best * 1e-9
                );
            }
        }
    }
    Ok(())
}
