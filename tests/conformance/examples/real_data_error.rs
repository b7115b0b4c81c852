//! The relative Frobenius error of the published estimator on Q, K and V of a real model.
//!
//! Arguments: safetensors files or folders with q.f16, k.f16 and v.f16; the problem in the repository when
//! there is none. Causal, b = m = 256, min_seq_len 1024, mean over seeds 0 to 3, per query head.

use std::path::PathBuf;

use hyperattn_conformance::real_data::{SCALE, folder, from_folder, from_safetensors};
use hyperattn_conformance::run::Setup;
use hyperattn_core::{Kernels, Mask, Method, Params, Residual};
use hyperattn_reference::relative_frobenius_error;

fn main() -> std::io::Result<()> {
    let mut paths: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    if paths.is_empty() {
        paths.push(folder());
    }
    let kernels = Kernels::detect(None);
    for path in paths {
        let inputs = if path.is_dir() { from_folder(&path)? } else { from_safetensors(&path)? };
        println!("{} {:?}", path.display(), inputs.shape);
        let base =
            Params { mask: Mask::CausalBottomRight, scale: SCALE, min_seq_len: 1024, ..Params::default() };
        let exact = Params { method: Method::Exact, ..base };
        let truth: Vec<f64> =
            Setup::new(kernels, &exact, &inputs).run().out.iter().map(|&x| x.into()).collect();
        for residual in [Residual::Uniform, Residual::RowNorm, Residual::None] {
            let errors: Vec<Vec<f64>> = (0..4)
                .map(|seed| {
                    let params = Params { method: Method::Paper, residual, seed, ..base };
                    let out = Setup::new(kernels, &params, &inputs).run().out;
                    let len = inputs.shape.n_q * inputs.shape.value_dim;
                    let heads = out.chunks(len).zip(truth.chunks(len));
                    heads.map(|(out, truth)| relative_frobenius_error(out, truth)).collect()
                })
                .collect();
            println!("residual {residual:?}: head, mean, errors of the seeds");
            for head in 0..inputs.shape.heads_q {
                let of_head: Vec<f64> = errors.iter().map(|seed| seed[head]).collect();
                let list: Vec<String> = of_head.iter().map(|error| format!("{error:.4}")).collect();
                println!("{head:4}  {:.4}  {}", of_head.iter().sum::<f64>() / 4.0, list.join(" "));
            }
        }
    }
    Ok(())
}
