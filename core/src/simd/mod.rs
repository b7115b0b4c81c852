//! One table of kernels per instruction set. The algorithm sees only the table.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod detect;
mod entries;
mod generic;
#[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
mod neon;
mod scalar;
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::element::DType;

/// Keys in one packed tile.
pub const KEY_TILE: usize = 64;

/// Instruction sets with a table, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Isa {
    /// No special instructions.
    Scalar,
    /// aarch64 NEON.
    Neon,
    /// x86-64 AVX2, FMA and F16C.
    Avx2,
    /// x86-64 AVX-512 F, with what [`Isa::Avx2`] has.
    Avx512,
}

impl Isa {
    /// "scalar", "neon", "avx2", "avx512".
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// The instruction set of this [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::Avx512].into_iter().find(|isa| isa.name() == name)
    }
}

/// Queries against one packed tile of keys: the unit of work of a kernel.
///
/// Logits are in base 2: the query rows carry `scale * log2(e)`. With R = `query_rows` and
/// P = `panel` of the table, rows come in groups of R and columns in panels of P.
pub struct Step<'a> {
    /// Elements of a query and of a key.
    pub head_dim: usize,
    /// Elements of a value, rounded up to a multiple of P.
    pub value_dim: usize,
    /// `[rows / R][head_dim][R]`.
    pub query: &'a [f32],
    /// `[KEY_TILE / P][head_dim][P]`; what lies beyond the last key is not looked at.
    pub keys: &'a [f32],
    /// `[value_dim / P][KEY_TILE][P]`; what lies beyond the last key is not looked at.
    pub values: &'a [f32],
    /// Keys in this tile, at most [`KEY_TILE`].
    pub key_count: usize,
    /// Added to the logits of each key (base 2, `[KEY_TILE]`).
    pub log_weight: Option<&'a [f32]>,
    /// Number of leading keys each row sees (`[rows]`); all when absent.
    pub visible: Option<&'a [u32]>,
    /// Upper bound on each row's logits before the weight is added (`[rows]`).
    pub cap: Option<&'a [f32]>,
    /// Whether these keys enter the sum.
    pub use_sum: bool,
    /// Whether these keys enter the product with the values.
    pub use_values: bool,
    /// Running maximum of each row's logits (`[rows]`, a multiple of R).
    pub max: &'a mut [f32],
    /// Running sum of each row's weights, relative to `max`.
    pub sum: &'a mut [f32],
    /// `[rows][value_dim]`, relative to `max`; left alone, not even rescaled, without `use_values`.
    pub accumulated: &'a mut [f32],
    /// Room for `[R][KEY_TILE]` logits.
    pub scores: &'a mut [f32],
}

/// The kernels of one instruction set.
pub struct Kernels {
    isa: Isa,
    query_rows: usize,
    panel: usize,
    lanes: usize,
    attend: unsafe fn(&mut Step<'_>),
    hash: unsafe fn(&[f32], usize, &[f32], usize, &mut [u32]),
    transpose: unsafe fn(&[f32], usize, usize, &mut [f32], usize),
    widen_f16: unsafe fn(*const u8, &mut [f32]),
}

impl core::fmt::Debug for Kernels {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "Kernels({})", self.isa.name())
    }
}

impl Kernels {
    /// The portable table.
    pub fn scalar() -> &'static Kernels {
        &scalar::KERNELS
    }

    /// The best table that this machine can run and that is not beyond `limit`. Asks the processor
    /// each time: keep the result.
    pub fn detect(limit: Option<Isa>) -> &'static Kernels {
        let mut best = Self::scalar();
        for kernels in Self::available() {
            if limit.is_none_or(|limit| kernels.isa <= limit) && kernels.isa > best.isa {
                best = kernels;
            }
        }
        best
    }

    /// Every table that this machine can run.
    pub fn available() -> impl Iterator<Item = &'static Kernels> {
        #[cfg(target_arch = "x86_64")]
        let tables = [
            Some(Self::scalar()),
            detect::has_avx2().then_some(&avx2::KERNELS),
            detect::has_avx512().then_some(&avx512::KERNELS),
        ];
        #[cfg(not(target_arch = "x86_64"))]
        let tables = [
            Some(Self::scalar()),
            #[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
            Some(&neon::KERNELS),
        ];
        tables.into_iter().flatten()
    }

    /// The table's instruction set.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    /// Queries in a group (R).
    pub fn query_rows(&self) -> usize {
        self.query_rows
    }

    /// Columns in a panel (P).
    pub fn panel(&self) -> usize {
        self.panel
    }

    /// Numbers in a vector: columns of a projection matrix, and keys that are packed at once, come in
    /// multiples of this.
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// Attends every row of the step to its keys, in one online softmax with what came before.
    pub fn attend(&self, step: &mut Step<'_>) {
        let rows = step.max.len();
        let full = |weights: Option<&[f32]>, len| weights.is_none_or(|slice| slice.len() >= len);
        assert!(
            rows.is_multiple_of(self.query_rows)
                && step.value_dim.is_multiple_of(self.panel)
                && step.key_count <= KEY_TILE
                && step.query.len() >= rows * step.head_dim
                && step.keys.len() >= KEY_TILE * step.head_dim
                && step.values.len() >= KEY_TILE * step.value_dim
                && full(step.log_weight, KEY_TILE)
                && full(step.cap, rows)
                && step.visible.is_none_or(|visible| visible.len() >= rows)
                && step.sum.len() >= rows
                && step.accumulated.len() >= rows * step.value_dim
                && step.scores.len() >= self.query_rows * KEY_TILE
        );
        // SAFETY: the lengths are those that Step states, and a table is handed out only where its
        // instructions are available.
        unsafe { (self.attend)(step) }
    }

    /// Sign codes of `rows` (`[codes.len()][head_dim]`) under `projections` (`[head_dim][width]`,
    /// `width` a multiple of [`Self::lanes`], at most 32): bit j of a code is set when the
    /// projection on column j, summed by fused multiply-adds in ascending order of the head
    /// dimension, is greater than 0 (Definition 1 of the paper).
    pub fn hash(&self, rows: &[f32], head_dim: usize, projections: &[f32], width: usize, codes: &mut [u32]) {
        assert!(
            width.is_multiple_of(self.lanes)
                && width <= 32
                && rows.len() == codes.len() * head_dim
                && projections.len() == head_dim * width
        );
        // SAFETY: as in `attend`.
        unsafe { (self.hash)(rows, head_dim, projections, width, codes) }
    }

    /// Packs [`Self::lanes`] keys as columns of a panel: number i of key j becomes `to[i * panel + j]`. Key j
    /// is at `rows[j * stride..]`; `stride` is at least `head_dim` rounded up to the lanes.
    pub(crate) fn transpose(&self, rows: &[f32], stride: usize, head_dim: usize, to: &mut [f32]) {
        assert!(
            stride >= head_dim.next_multiple_of(self.lanes)
                && rows.len() >= self.lanes * stride
                && to.len() >= (head_dim - 1) * self.panel + self.lanes
        );
        // SAFETY: as in `attend`.
        unsafe { (self.transpose)(rows, stride, head_dim, to, self.panel) }
    }

    /// Widens `to.len()` consecutive elements at `from`.
    ///
    /// # Safety
    /// They are readable.
    pub(crate) unsafe fn widen(&self, dtype: DType, from: *const u8, to: &mut [f32]) {
        // SAFETY: `from` has to.len() readable elements of `dtype` (contract).
        unsafe {
            match dtype {
                DType::F32 => {
                    core::ptr::copy_nonoverlapping(from, to.as_mut_ptr().cast::<u8>(), to.len() * 4);
                }
                DType::F16 => (self.widen_f16)(from, to),
                DType::BF16 => generic::widen_bf16(from, to),
            }
        }
    }
}
