//! One problem: what a call computes, on what, and with how many threads.

use hyperattn_core::{DType, Mask, Method, Params, Residual};

/// How `[batch, heads, sequence, head_dim]` lies in memory; the letters say the order, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemoryOrder {
    /// A head's rows are neighbours.
    Bhsd,
    /// A token's heads are neighbours.
    Bshd,
}

/// What a call computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// The output.
    Forward,
    /// The gradients with respect to q, k and v.
    Backward,
}

/// Where the numbers of q, k and v come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Standard normal numbers.
    Normal,
    /// A real model's, from `tests/data`: the first tokens, and its heads again and again.
    Model,
}

/// What decides the inputs. Problems with the same shape run on the same numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Where the numbers come from.
    pub source: Source,
    /// Element types of q, k and v.
    pub dtypes: [DType; 3],
    /// Order of all tensors.
    pub layout: MemoryOrder,
    /// Batch items.
    pub batch: usize,
    /// Query heads.
    pub heads_q: usize,
    /// Key and value heads.
    pub heads_kv: usize,
    /// Queries.
    pub n_q: usize,
    /// Keys.
    pub n_k: usize,
    /// Elements of a query, key and value.
    pub head_dim: usize,
}

/// One problem of a list.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Problem {
    /// The inputs.
    pub shape: Shape,
    /// Element type of the output.
    pub dtype_out: DType,
    /// The options of the call that a list can set; the others have the library's defaults.
    pub params: Params,
    /// What is timed.
    pub pass: Pass,
    /// Threads that compute.
    pub threads: usize,
}

const METHODS: [(&str, Method); 4] = [
    ("exact", Method::Exact),
    ("paper", Method::Paper),
    ("refined", Method::Refined),
    ("auto", Method::Auto),
];
const PASSES: [(&str, Pass); 2] = [("forward", Pass::Forward), ("backward", Pass::Backward)];
const MASKS: [(&str, Mask); 2] = [("none", Mask::None), ("causal", Mask::CausalBottomRight)];
const DTYPES: [(&str, DType); 3] = [("f32", DType::F32), ("f16", DType::F16), ("bf16", DType::BF16)];
const ORDERS: [(&str, MemoryOrder); 2] = [("bhsd", MemoryOrder::Bhsd), ("bshd", MemoryOrder::Bshd)];
const SOURCES: [(&str, Source); 2] = [("normal", Source::Normal), ("model", Source::Model)];
const RESIDUALS: [(&str, Residual); 3] =
    [("uniform", Residual::Uniform), ("row_norm", Residual::RowNorm), ("none", Residual::None)];

impl Default for Problem {
    fn default() -> Self {
        Problem {
            shape: Shape {
                source: Source::Normal,
                dtypes: [DType::F32; 3],
                layout: MemoryOrder::Bhsd,
                batch: 1,
                heads_q: 1,
                heads_kv: 1,
                n_q: 1024,
                n_k: 1024,
                head_dim: 64,
            },
            dtype_out: DType::F32,
            params: Params { method: Method::Exact, ..Params::default() },
            pass: Pass::Forward,
            threads: 1,
        }
    }
}

impl Problem {
    /// The settings that together say everything, in the order of the CSV columns.
    pub const SETTINGS: [&str; 24] = [
        "method",
        "pass",
        "mask",
        "inputs",
        "dtype_q",
        "dtype_k",
        "dtype_v",
        "dtype_out",
        "layout",
        "batch",
        "heads_q",
        "heads_kv",
        "n_q",
        "n_k",
        "head_dim",
        "threads",
        "min_seq_len",
        "block_size",
        "sample_size",
        "residual",
        "budget",
        "num_first_keys",
        "band",
        "target_error",
    ];

    /// Settings that stand for several of [`Self::SETTINGS`].
    pub const SHORT_FORMS: [&str; 3] = ["dtype", "heads", "n"];

    /// Changes one setting.
    ///
    /// # Errors
    /// A sentence about the name or the value.
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let Problem { shape, params, .. } = self;
        match name {
            "method" => params.method = choose(&METHODS, value)?,
            "pass" => self.pass = choose(&PASSES, value)?,
            "mask" => params.mask = choose(&MASKS, value)?,
            "inputs" => shape.source = choose(&SOURCES, value)?,
            "dtype" => {
                self.dtype_out = choose(&DTYPES, value)?;
                shape.dtypes = [self.dtype_out; 3];
            }
            "dtype_q" => shape.dtypes[0] = choose(&DTYPES, value)?,
            "dtype_k" => shape.dtypes[1] = choose(&DTYPES, value)?,
            "dtype_v" => shape.dtypes[2] = choose(&DTYPES, value)?,
            "dtype_out" => self.dtype_out = choose(&DTYPES, value)?,
            "layout" => shape.layout = choose(&ORDERS, value)?,
            "batch" => shape.batch = positive(value)?,
            "heads" => (shape.heads_q, shape.heads_kv) = (positive(value)?, positive(value)?),
            "heads_q" => shape.heads_q = positive(value)?,
            "heads_kv" => shape.heads_kv = positive(value)?,
            "n" => (shape.n_q, shape.n_k) = (positive(value)?, positive(value)?),
            "n_q" => shape.n_q = positive(value)?,
            "n_k" => shape.n_k = positive(value)?,
            "head_dim" => shape.head_dim = positive(value)?,
            "threads" => self.threads = positive(value)?,
            "min_seq_len" => params.min_seq_len = number(value)?,
            "block_size" => params.block_size = narrow(number(value)?)?,
            "sample_size" => params.sample_size = narrow(number(value)?)?,
            "residual" => params.residual = choose(&RESIDUALS, value)?,
            "budget" => params.budget = narrow(number(value)?)?,
            "num_first_keys" => params.num_first_keys = narrow(number(value)?)?,
            "band" => params.band = narrow(number(value)?)?,
            "target_error" => params.target_error = fraction(value)?,
            _ => {
                let known = Self::SHORT_FORMS.iter().chain(&Self::SETTINGS).copied().collect::<Vec<_>>();
                return Err(format!("unknown setting; there are {}", known.join(", ")));
            }
        }
        Ok(())
    }

    /// The value of one of [`Self::SETTINGS`], as [`Self::set`] reads it.
    pub fn get(&self, name: &str) -> String {
        let Problem { shape, params, .. } = self;
        match name {
            "method" => name_of(&METHODS, params.method),
            "pass" => name_of(&PASSES, self.pass),
            "mask" => name_of(&MASKS, params.mask),
            "inputs" => name_of(&SOURCES, shape.source),
            "dtype_q" => name_of(&DTYPES, shape.dtypes[0]),
            "dtype_k" => name_of(&DTYPES, shape.dtypes[1]),
            "dtype_v" => name_of(&DTYPES, shape.dtypes[2]),
            "dtype_out" => name_of(&DTYPES, self.dtype_out),
            "layout" => name_of(&ORDERS, shape.layout),
            "batch" => shape.batch.to_string(),
            "heads_q" => shape.heads_q.to_string(),
            "heads_kv" => shape.heads_kv.to_string(),
            "n_q" => shape.n_q.to_string(),
            "n_k" => shape.n_k.to_string(),
            "head_dim" => shape.head_dim.to_string(),
            "threads" => self.threads.to_string(),
            "min_seq_len" => params.min_seq_len.to_string(),
            "block_size" => params.block_size.to_string(),
            "sample_size" => params.sample_size.to_string(),
            "residual" => name_of(&RESIDUALS, params.residual),
            "budget" => params.budget.to_string(),
            "num_first_keys" => params.num_first_keys.to_string(),
            "band" => params.band.to_string(),
            "target_error" => params.target_error.to_string(),
            _ => panic!("{name} is not one of Problem::SETTINGS"),
        }
    }

    /// Whether the method looks at a setting.
    pub fn looks_at(&self, name: &str) -> bool {
        let method = self.params.method;
        match name {
            "min_seq_len" | "residual" => method != Method::Exact,
            "block_size" | "sample_size" => method == Method::Paper,
            // Without a block mask AUTO is exact or refined.
            "budget" | "num_first_keys" | "band" | "target_error" => {
                matches!(method, Method::Refined | Method::Auto)
            }
            _ => true,
        }
    }

    /// All element types: one name where they agree, else q/k/v/out.
    pub fn dtypes(&self) -> String {
        let names = ["dtype_q", "dtype_k", "dtype_v", "dtype_out"].map(|name| self.get(name));
        if names.iter().all(|name| *name == names[0]) { names[0].clone() } else { names.join("/") }
    }

    /// Queries and keys: one number where they agree.
    pub fn lengths(&self) -> String {
        pair(self.shape.n_q, self.shape.n_k)
    }

    /// Query and KV heads: one number where they agree.
    pub fn heads(&self) -> String {
        pair(self.shape.heads_q, self.shape.heads_kv)
    }

    /// The settings in short: what always matters, and what differs from the default.
    pub fn label(&self) -> String {
        let Shape { batch, head_dim, .. } = self.shape;
        let method = self.get("method");
        let mut label = format!(
            "{} {} {} n{} d{head_dim} h{} t{}",
            if self.pass == Pass::Forward { method } else { method + " " + &self.get("pass") },
            self.get("mask"),
            self.dtypes(),
            self.lengths(),
            self.heads(),
            self.threads
        );
        if batch > 1 {
            label += &format!(" batch={batch}");
        }
        let of_estimators = Self::SETTINGS.iter().skip_while(|name| **name != "min_seq_len");
        for name in ["inputs", "layout"].iter().chain(of_estimators) {
            if self.looks_at(name) && self.get(name) != Problem::default().get(name) {
                label += &format!(" {name}={}", self.get(name));
            }
        }
        label
    }

    /// Floating-point operations of exact attention on this shape: 4 n_q n_k head_dim a head, and 10 for the gradients;
    /// under the causal mask half of that for the square that it cuts.
    pub fn exact_flops(&self) -> f64 {
        let Shape { n_q, n_k, .. } = self.shape;
        let pairs = match self.params.mask {
            Mask::None => n_q as f64 * n_k as f64,
            _ => {
                let square = n_q.min(n_k) as f64;
                n_q as f64 * (n_k as f64 - square) + square * square / 2.0
            }
        };
        self.flops_of_pairs(pairs)
    }

    /// Floating-point operations when every query meets `keys_per_query` keys.
    pub fn computed_flops(&self, keys_per_query: f64) -> f64 {
        self.flops_of_pairs(self.shape.n_q as f64 * keys_per_query)
    }

    fn flops_of_pairs(&self, pairs: f64) -> f64 {
        let Shape { batch, heads_q, head_dim, .. } = self.shape;
        let products = match self.pass {
            Pass::Forward => 2.0,
            Pass::Backward => 5.0,
        };
        2.0 * products * pairs * (batch * heads_q * head_dim) as f64
    }
}

fn choose<T: Copy>(table: &[(&str, T)], value: &str) -> Result<T, String> {
    let names = || table.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    let found = table.iter().find(|(name, _)| *name == value);
    found.map(|(_, chosen)| *chosen).ok_or_else(|| format!("the value must be one of {}", names()))
}

fn name_of<T: Copy + PartialEq>(table: &[(&str, T)], value: T) -> String {
    let found = table.iter().find(|(_, chosen)| *chosen == value);
    found.map_or_else(String::new, |(name, _)| (*name).to_string())
}

fn pair(a: usize, b: usize) -> String {
    if a == b { a.to_string() } else { format!("{a}/{b}") }
}

/// A whole number; k and m multiply by 1,024 and 1,048,576.
fn number(value: &str) -> Result<usize, String> {
    let (digits, factor) = match value.as_bytes().last() {
        Some(b'k') => (&value[..value.len() - 1], 1 << 10),
        Some(b'm') => (&value[..value.len() - 1], 1 << 20),
        _ => (value, 1),
    };
    let parsed = digits.parse::<usize>().ok().and_then(|number| number.checked_mul(factor));
    parsed.ok_or_else(|| "the value must be a whole number such as 100, 4k or 1m".to_string())
}

fn positive(value: &str) -> Result<usize, String> {
    match number(value)? {
        0 => Err("the value must be at least 1".to_string()),
        number => Ok(number),
    }
}

fn narrow(value: usize) -> Result<u32, String> {
    u32::try_from(value).map_err(|_| format!("the value must be at most {}", u32::MAX))
}

fn fraction(value: &str) -> Result<f32, String> {
    let parsed = value.parse().ok().filter(|number: &f32| number.is_finite() && *number >= 0.0);
    parsed.ok_or_else(|| "the value must be a number of at least 0, such as 0.05".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_setting_is_read_as_it_is_written() {
        let values = [
            "paper", "backward", "causal", "model", "f32", "f16", "bf16", "f16", "bshd", "2", "8", "4",
            "100", "300", "96", "3", "17", "128", "64", "row_norm", "500", "4", "256", "0.125",
        ];
        assert_eq!(values.len(), Problem::SETTINGS.len());
        let mut problem = Problem::default();
        for (name, value) in Problem::SETTINGS.into_iter().zip(values) {
            problem.set(name, value).unwrap();
        }
        for (name, value) in Problem::SETTINGS.into_iter().zip(values) {
            assert_eq!(problem.get(name), value, "{name}");
            assert_ne!(
                problem.get(name),
                if name == "dtype_q" { String::new() } else { Problem::default().get(name) }
            );
        }
    }

    #[test]
    fn short_forms_set_all_that_they_stand_for() {
        let mut problem = Problem::default();
        for (name, value) in [("dtype", "bf16"), ("dtype_q", "f32"), ("heads", "8"), ("n", "4k")] {
            problem.set(name, value).unwrap();
        }
        assert_eq!(problem.dtypes(), "f32/bf16/bf16/bf16");
        let Shape { heads_q, heads_kv, n_q, n_k, .. } = problem.shape;
        assert_eq!((heads_q, heads_kv, n_q, n_k), (8, 8, 4096, 4096));
    }

    #[test]
    fn suffixes_multiply() {
        assert_eq!(number("1m"), Ok(1 << 20));
        assert_eq!(number("16k"), Ok(16_384));
        for bad in ["", "k", "-1", "1.5", "4K", "99999999999999m"] {
            assert!(number(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn labels_name_what_the_method_looks_at_and_what_is_not_the_library_s_default() {
        let mut problem = Problem::default();
        problem.set("method", "refined").unwrap();
        assert_eq!(problem.params, Params { method: Method::Refined, ..Params::default() });
        assert_eq!(problem.label(), "refined none f32 n1024 d64 h1 t1");
        for (name, value) in [("budget", "2k"), ("target_error", "0"), ("block_size", "64")] {
            problem.set(name, value).unwrap();
        }
        assert_eq!(problem.label(), "refined none f32 n1024 d64 h1 t1 budget=2048 target_error=0");
        problem.set("method", "paper").unwrap();
        assert_eq!(problem.label(), "paper none f32 n1024 d64 h1 t1 block_size=64");
        problem.set("pass", "backward").unwrap();
        assert_eq!(problem.label(), "paper backward none f32 n1024 d64 h1 t1 block_size=64");
    }

    #[test]
    fn targets_are_numbers_of_at_least_0() {
        assert_eq!(fraction("0"), Ok(0.0));
        assert_eq!(fraction("5e-2"), Ok(0.05));
        for bad in ["", "-0.1", "5%", "nan", "inf"] {
            assert!(fraction(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn operations_are_halved_by_the_square_only() {
        let mut problem = Problem::default();
        problem.set("n", "8").unwrap();
        problem.set("head_dim", "2").unwrap();
        assert_eq!(problem.exact_flops(), 4.0 * 64.0 * 2.0);
        assert_eq!(problem.computed_flops(8.0), problem.exact_flops());
        problem.set("mask", "causal").unwrap();
        assert_eq!(problem.exact_flops(), 2.0 * 64.0 * 2.0);
        problem.set("n_k", "10").unwrap();
        assert_eq!(problem.exact_flops(), 4.0 * (16.0 + 32.0) * 2.0);
        problem.set("pass", "backward").unwrap();
        assert_eq!(problem.exact_flops(), 2.5 * 4.0 * (16.0 + 32.0) * 2.0);
        assert_eq!(problem.computed_flops(3.0), 10.0 * 8.0 * 3.0 * 2.0);
    }
}
