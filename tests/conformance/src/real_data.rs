//! Q, K and V of a real model, in f16, from files.

use std::fs;
use std::io::{Error, Result};
use std::path::{Path, PathBuf};

use hyperattn_core::{DType, f16};

use crate::inputs::{Inputs, Shape};

/// The softmax scale of the stored problems: 1 / sqrt(64).
pub const SCALE: f32 = 0.125;

/// The folder of the problem that is in the repository.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/qwen2.5-coder-0.5b_novel_layer12")
}

fn f16_numbers(bytes: &[u8]) -> Vec<f32> {
    let number = |pair: &[u8]| f16::from_le_bytes([pair[0], pair[1]]).to_f32();
    bytes.chunks_exact(2).map(number).collect()
}

fn inputs(q: Vec<f32>, k: Vec<f32>, v: Vec<f32>, [heads_q, heads_kv, n, d]: [usize; 4]) -> Result<Inputs> {
    if q.len() != heads_q * n * d || k.len() != heads_kv * n * d || v.len() != k.len() {
        return Err(Error::other(format!("not {heads_q} and {heads_kv} heads of {n} tokens of {d}")));
    }
    let shape = Shape { batch: 1, heads_q, heads_kv, n_q: n, n_k: n, head_dim: d, value_dim: d };
    Ok(Inputs { shape, dtypes: DType::F16.into(), q, k, v })
}

/// `q.f16`, `k.f16` and `v.f16` of a folder like the one in the repository: 8,192 tokens, head_dim 64.
pub fn from_folder(folder: &Path) -> Result<Inputs> {
    let read = |name| Ok::<_, Error>(f16_numbers(&fs::read(folder.join(name))?));
    let (q, k, v) = (read("q.f16")?, read("k.f16")?, read("v.f16")?);
    let (n, d) = (8192, 64);
    let heads = [q.len() / (n * d), k.len() / (n * d), n, d];
    inputs(q, k, v, heads)
}

/// The numbers between the brackets after `key`, searched from `from` in `header`.
fn bracketed(header: &str, from: usize, key: &str) -> Option<Vec<usize>> {
    let start = from + header[from..].find(key)? + key.len();
    let start = start + header[start..].find('[')? + 1;
    let end = start + header[start..].find(']')?;
    header[start..end].split(',').map(|number| number.trim().parse().ok()).collect()
}

/// Tensors q, k and v (f16, `[heads, tokens, head_dim]`) of a safetensors file: eight bytes of header
/// length, a JSON header, the data.
pub fn from_safetensors(file: &Path) -> Result<Inputs> {
    let bytes = fs::read(file)?;
    let malformed = || Error::other(format!("{} is not a safetensors file with f16 q, k, v", file.display()));
    let (length, rest) = bytes.split_first_chunk::<8>().ok_or_else(malformed)?;
    let length = u64::from_le_bytes(*length) as usize;
    let (header, data) = rest.split_at_checked(length).ok_or_else(malformed)?;
    let header = std::str::from_utf8(header).map_err(|_| malformed())?;
    let tensor = |name: &str| -> Option<(Vec<f32>, Vec<usize>)> {
        let at = header.find(&format!("\"{name}\":{{\"dtype\":\"F16\""))?;
        let range = bracketed(header, at, "data_offsets")?;
        Some((f16_numbers(data.get(*range.first()?..*range.get(1)?)?), bracketed(header, at, "shape")?))
    };
    let (q, q_shape) = tensor("q").ok_or_else(malformed)?;
    let (k, k_shape) = tensor("k").ok_or_else(malformed)?;
    let (v, _) = tensor("v").ok_or_else(malformed)?;
    let (&[heads_q, n, d], &[heads_kv, ..]) = (&q_shape[..], &k_shape[..]) else { return Err(malformed()) };
    inputs(q, k, v, [heads_q, heads_kv, n, d])
}

/// The first `n` tokens.
pub fn prefix(inputs: &Inputs, n: usize) -> Inputs {
    let shape = inputs.shape;
    let cut = |values: &[f32], dim: usize| -> Vec<f32> {
        values.chunks_exact(shape.n_q * dim).flat_map(|head| &head[..n * dim]).copied().collect()
    };
    Inputs {
        shape: Shape { n_q: n, n_k: n, ..shape },
        dtypes: inputs.dtypes,
        q: cut(&inputs.q, shape.head_dim),
        k: cut(&inputs.k, shape.head_dim),
        v: cut(&inputs.v, shape.value_dim),
    }
}
