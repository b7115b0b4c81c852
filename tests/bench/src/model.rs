//! Queries, keys and values of a real model, from the files in `tests/data`.

use std::fs;
use std::path::{Path, PathBuf};

use hyperattn_core::f16;

/// Tokens of the stored problem, and elements of its rows.
const TOKENS: usize = 8192;
const HEAD_DIM: usize = 64;

/// The folder's name, there and beside a program that was taken to another machine.
const NAME: &str = "qwen2.5-coder-0.5b_novel_layer12";

/// The stored heads of queries, keys and values.
pub struct Model([Vec<f16>; 3]);

impl Model {
    /// Reads the files of HYPERATTN_TEST_DATA, else of the repository or beside the program.
    ///
    /// # Errors
    /// Which file is missing or of another size.
    pub fn read() -> Result<Self, String> {
        let folder = folder();
        let read = |name: &str| {
            let file = folder.join(name);
            let bytes = fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?;
            if bytes.is_empty() || bytes.len() % (2 * TOKENS * HEAD_DIM) != 0 {
                return Err(format!("{}: not heads of {TOKENS} rows of {HEAD_DIM} f16", file.display()));
            }
            Ok(bytes.as_chunks().0.iter().map(|&number| f16::from_le_bytes(number)).collect())
        };
        Ok(Model([read("q.f16")?, read("k.f16")?, read("v.f16")?]))
    }

    /// Whether there are as many rows as `n` and as many elements in one as `head_dim`.
    ///
    /// # Errors
    /// A sentence on what there is.
    pub fn check(n: usize, head_dim: usize) -> Result<(), String> {
        if n <= TOKENS && head_dim == HEAD_DIM {
            return Ok(());
        }
        Err(format!("inputs=model has head_dim={HEAD_DIM} and n up to {TOKENS}, not {head_dim} and {n}"))
    }

    /// An element of q (`tensor` 0), k or v. Heads beyond the stored ones are those again.
    pub fn number(&self, tensor: usize, head: usize, row: usize, column: usize) -> f32 {
        let numbers = &self.0[tensor];
        let heads = numbers.len() / (TOKENS * HEAD_DIM);
        numbers[(head % heads * TOKENS + row) * HEAD_DIM + column].to_f32()
    }
}

fn folder() -> PathBuf {
    if let Some(folder) = std::env::var_os("HYPERATTN_TEST_DATA") {
        return folder.into();
    }
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../data").join(NAME);
    let program = std::env::current_exe().unwrap_or_default();
    match program.parent() {
        Some(beside) if !repository.is_dir() => beside.join(NAME),
        _ => repository,
    }
}
