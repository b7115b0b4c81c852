//! One table of kernels per instruction set. The algorithm sees only the table.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
#[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
mod detect_aarch64;
#[cfg(target_arch = "x86_64")]
mod detect_x86;
mod entries;
mod generic;
mod gradient;
mod mask;
#[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
mod neon;
#[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
mod neon_bf16;
mod prefetch;
mod product;
mod register_tile;
mod rows;
mod scalar;
mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

use crate::element::DType;
pub(crate) use mask::{HIDDEN_BELOW, MaskSurvey, leading_zeros};
pub(crate) use prefetch::prefetch;

/// Keys in one packed tile.
pub const KEY_TILE: usize = 64;

/// Queries of a [`Weighing`].
pub const WEIGHING_QUERIES: usize = 8;

/// Rows hashed at once: enough independent chains to hide the latency of a fused multiply-add.
pub const HASH_ROWS: usize = 8;

/// Instruction sets with a table, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Isa {
    /// No special instructions.
    Scalar,
    /// aarch64 NEON.
    Neon,
    /// aarch64 BF16 (FEAT_BF16), with what [`Isa::Neon`] has.
    NeonBf16,
    /// x86-64 AVX2, FMA and F16C.
    Avx2,
    /// x86-64 AVX-512 F, with what [`Isa::Avx2`] has.
    Avx512,
    /// x86-64 AVX-512 BF16, with what [`Isa::Avx512`] has.
    Avx512Bf16,
}

impl Isa {
    const ALL: [Isa; 6] = [Isa::Scalar, Isa::Neon, Isa::NeonBf16, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16];

    /// "scalar", "neon", "neon_bf16", "avx2", "avx512", "avx512_bf16".
    pub const fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::NeonBf16 => "neon_bf16",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Bf16 => "avx512_bf16",
        }
    }

    /// The instruction set of this [`name`](Self::name).
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|isa| isa.name() == name)
    }
}

/// What the 32-bit words of packed queries, keys and values are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// One f32.
    F32,
    /// Two neighbouring bf16, the first in the lower half: elements of a query or a key, or one column of the
    /// values of two keys. Absent elements are 0.
    Bf16Pairs,
}

impl Packing {
    /// Elements in a word.
    pub const fn depth(self) -> usize {
        match self {
            Packing::F32 => 1,
            Packing::Bf16Pairs => 2,
        }
    }
}

/// How the query rows of a step meet its keys.
#[derive(Clone, Copy)]
pub struct StepOptions<'a> {
    /// Keys in this tile, at most [`KEY_TILE`].
    pub key_count: usize,
    /// Added to all logits (base 2).
    pub shift: f32,
    /// Added to the logits of each key (base 2, `[KEY_TILE]`).
    pub log_weight: Option<&'a [f32]>,
    /// Number of leading keys each row sees (`[rows]`); all when absent.
    pub visible: Option<&'a [u32]>,
    /// Added to the logits (natural logarithm), and the distance from one row's [`KEY_TILE`] numbers to the next row's;
    /// a row does not see a key that has less than -2^127 there.
    pub mask: Option<(&'a [f32], usize)>,
    /// Upper bound on each row's logits before weight and shift are added (`[rows]`).
    pub cap: Option<&'a [f32]>,
    /// Whether these keys enter the sum.
    pub use_sum: bool,
    /// Whether these keys enter the product with the values.
    pub use_values: bool,
}

impl StepOptions<'_> {
    /// All of a tile's keys as they are, met by every row: plain attention.
    pub const PLAIN: Self = StepOptions {
        key_count: KEY_TILE,
        shift: 0.0,
        log_weight: None,
        visible: None,
        mask: None,
        cap: None,
        use_sum: true,
        use_values: true,
    };

    /// Whether the slices are as long as they must be for `rows` rows.
    fn are_whole(&self, rows: usize) -> bool {
        self.key_count <= KEY_TILE
            && self.log_weight.is_none_or(|weights| weights.len() >= KEY_TILE)
            && self.visible.is_none_or(|visible| visible.len() >= rows)
            && self.cap.is_none_or(|caps| caps.len() >= rows)
            && self.mask.is_none_or(|(mask, stride)| {
                stride >= KEY_TILE && rows > 0 && mask.len() >= (rows - 1) * stride + KEY_TILE
            })
    }
}

/// Queries against one packed tile of keys: the unit of work of a kernel.
///
/// Logits are in base 2. With R = `query_rows`, P = `panel` and L = `lanes` of the table, rows come in groups
/// of R, the last of which may have only a multiple of T = `row_multiple`, keys in panels of P, and the columns of the
/// values in panels of P and, where less than P are left, of L.
/// W is the number of words that hold `head_dim` elements, S the number that hold [`KEY_TILE`].
pub struct Step<'a> {
    /// What the words are.
    pub packing: Packing,
    /// Elements of a query and of a key.
    pub head_dim: usize,
    /// Elements of a value, rounded up to a multiple of L.
    pub value_dim: usize,
    /// Factor on the products of [`Packing::Bf16Pairs`]; queries of [`Packing::F32`] carry it.
    pub scale: f32,
    /// `[groups][W][R]`.
    pub query: &'a [u32],
    /// `[KEY_TILE / P][W][P]`; what lies beyond the last key is not looked at.
    pub keys: &'a [u32],
    /// `[panels][S][P or L]`; words beyond the last key are not looked at.
    pub values: &'a [u32],
    /// How rows meet these keys.
    pub options: StepOptions<'a>,
    /// What each row's weights are relative to (`[rows]`, a multiple of T): -inf as long as a row has seen
    /// nothing but -inf, then a logit that no other exceeds by more than 8.
    pub max: &'a mut [f32],
    /// Running sums of each row's weights, relative to `max`; their sum is the row's (`[rows][L]`).
    pub sum: &'a mut [f32],
    /// `[rows][value_dim]`, relative to `max`; left alone, not even rescaled, without `use_values`.
    pub accumulated: &'a mut [f32],
    /// Room for the logits of a group against a panel: `[R][P]`.
    pub logits: &'a mut [f32],
    /// Room for the weights of a group: `[R][S]`.
    pub weights: &'a mut [u32],
}

/// A few queries against one packed tile of keys: how much weight they give to each key.
///
/// With the names of [`Step`], for [`WEIGHING_QUERIES`] queries.
pub struct Weighing<'a> {
    /// What the words are.
    pub packing: Packing,
    /// Elements of a query and of a key.
    pub head_dim: usize,
    /// As in [`Step`].
    pub scale: f32,
    /// `[W][WEIGHING_QUERIES]`.
    pub query: &'a [u32],
    /// `[KEY_TILE / P][W][P]`.
    pub keys: &'a [u32],
    /// Keys in this tile, at most [`KEY_TILE`].
    pub key_count: usize,
    /// What the logits of each query are relative to (base 2, `[WEIGHING_QUERIES]`); with infinity the query gives no weight.
    pub start: &'a [f32],
    /// Room for logits, as in [`Step`].
    pub logits: &'a mut [f32],
    /// The sum over the queries of 2^(logit - start), at most 2^60 from each, NaN counting as that (`[KEY_TILE]`);
    /// unspecified beyond the last key.
    pub weights: &'a mut [f32],
}

/// Query rows against one tile of keys in the backward pass (core/docs/backward.md): what they add to the gradients.
///
/// P and L are those of [`Step`]; Dk and Dv are `head_dim` and `value_dim` rounded up to multiples of L, and columns
/// that this adds hold 0. There is any number of rows but none.
pub struct GradientStep<'a> {
    /// Elements of a query and of a key.
    pub head_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// Factor on the products of queries and keys that makes them logits in base 2.
    pub scale_log2: f32,
    /// `[rows][Dk]`, without the scale.
    pub query: &'a [f32],
    /// Gradient of the output (`[rows][Dv]`).
    pub output_gradient: &'a [f32],
    /// `[KEY_TILE][Dk]`; what lies beyond the last key is not looked at, here and below.
    pub keys: &'a [f32],
    /// The keys as bits of f32: `[KEY_TILE / P][head_dim][P]`.
    pub key_panels: &'a [u32],
    /// The values as bits of f32: `[KEY_TILE / P][value_dim][P]`.
    pub value_panels: &'a [u32],
    /// How rows meet these keys, of which there is at least one. A pair whose logit is above its row's cap is a
    /// constant and has no weight here. Without `use_values` nobody looks at `output_gradient`, `value_panels` and
    /// `value_gradient`.
    pub options: StepOptions<'a>,
    /// Base-2 logarithm of each row's sum; -inf for a row that saw nothing, which then adds and gets nothing
    /// (`[rows]`).
    pub log2_sum: &'a [f32],
    /// What all logits of a row have in common in their gradients (`[rows]`).
    pub delta: &'a [f32],
    /// Added to: `[rows][Dk]`.
    pub query_gradient: &'a mut [f32],
    /// Added to: `[KEY_TILE][Dk]`.
    pub key_gradient: &'a mut [f32],
    /// Added to: `[KEY_TILE][Dv]`.
    pub value_gradient: &'a mut [f32],
    /// Room for the weights: `[rows][KEY_TILE]`.
    pub weights: &'a mut [f32],
    /// Room for the gradients of the logits: `[rows][KEY_TILE]`.
    pub logit_gradients: &'a mut [f32],
}

/// What a table does with bf16 pairs.
#[derive(Clone, Copy)]
struct Bf16Kernels {
    attend: unsafe fn(&mut Step<'_>),
    weigh: unsafe fn(&mut Weighing<'_>),
}

/// (rows, projections, width, codes), see [`Kernels::hash`].
type Hash = unsafe fn(&[&[u32]], &[f32], usize, &mut [u32]);

/// (rows, words, scale, to), see [`Kernels::pack_queries`].
type PackQueries = unsafe fn(&[&[u32]], usize, Option<f32>, &mut [u32]);

/// (element type, address, (rows, bytes between them), elements of a row), see [`Kernels::survey_mask`].
type SurveyMask = unsafe fn(DType, *const u8, (usize, isize), usize) -> MaskSurvey;

/// The kernels of one instruction set.
pub struct Kernels {
    isa: Isa,
    query_rows: usize,
    row_multiple: usize,
    panel: usize,
    lanes: usize,
    attend: unsafe fn(&mut Step<'_>),
    weigh: unsafe fn(&mut Weighing<'_>),
    attend_gradient: unsafe fn(&mut GradientStep<'_>),
    bf16: Option<Bf16Kernels>,
    hash: Hash,
    transpose: unsafe fn(&[&[u32]], usize, &mut [u32], usize),
    pack_queries: PackQueries,
    place: unsafe fn(&[u32], usize, usize, &mut [u32]),
    add_weighted: unsafe fn(&[f32], usize, &[f32], &mut [f32]),
    squared_distances: unsafe fn(&[f32], &[f32], &mut [f32]),
    widen_f16: unsafe fn(*const u8, &mut [f32]),
    survey_mask: SurveyMask,
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

    /// The best table that this machine can run and that is not beyond `limit`. A table whose bf16
    /// instructions are slower than the f32 ones on this processor is passed over unless `limit` names it.
    /// Asks the processor each time: keep the result.
    pub fn detect(limit: Option<Isa>) -> &'static Kernels {
        let mut best = Self::scalar();
        for kernels in Self::available() {
            let allowed = match limit {
                Some(limit) => kernels.isa <= limit,
                None => kernels.is_worth_choosing(),
            };
            if allowed && kernels.isa > best.isa {
                best = kernels;
            }
        }
        best
    }

    /// Whether bf16 products, where the table has them, cost no more than f32 ones on this processor.
    fn is_worth_choosing(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let fast = detect_x86::bf16_products_are_fast();
        #[cfg(not(target_arch = "x86_64"))]
        let fast = true;
        self.bf16.is_none() || fast
    }

    /// Every table that this machine can run.
    pub fn available() -> impl Iterator<Item = &'static Kernels> {
        #[cfg(target_arch = "x86_64")]
        let tables = [
            Some(Self::scalar()),
            detect_x86::has_avx2().then_some(&avx2::KERNELS),
            detect_x86::has_avx512().then_some(&avx512::KERNELS),
            detect_x86::has_avx512_bf16().then_some(&avx512_bf16::KERNELS),
        ];
        #[cfg(not(target_arch = "x86_64"))]
        let tables = [
            Some(Self::scalar()),
            #[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
            Some(&neon::KERNELS),
            #[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
            detect_aarch64::has_bf16().then_some(&neon_bf16::KERNELS),
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

    /// Rows of a step come in multiples of this (T).
    pub fn row_multiple(&self) -> usize {
        self.row_multiple
    }

    /// Keys in a panel (P).
    pub fn panel(&self) -> usize {
        self.panel
    }

    /// Numbers in a vector (L): columns of a projection matrix, and keys that are packed at once, come in
    /// multiples of this.
    pub fn lanes(&self) -> usize {
        self.lanes
    }

    /// How tensors of this element type, all three of it, are packed.
    pub fn packing(&self, dtype: DType) -> Packing {
        if dtype == DType::BF16 && self.bf16.is_some() { Packing::Bf16Pairs } else { Packing::F32 }
    }

    /// Attends every row of the step to its keys, in one online softmax with what came before.
    ///
    /// Panics when the table has no kernel for the step's packing or a slice is shorter than it must be.
    pub fn attend(&self, step: &mut Step<'_>) {
        let rows = step.max.len();
        let depth = step.packing.depth();
        let words = step.head_dim.div_ceil(depth);
        assert!(
            rows.is_multiple_of(self.row_multiple)
                && step.value_dim.is_multiple_of(self.lanes)
                && step.options.are_whole(rows)
                && step.query.len() >= rows.next_multiple_of(self.query_rows) * words
                && step.keys.len() >= KEY_TILE * words
                && step.values.len() >= KEY_TILE / depth * step.value_dim
                && step.sum.len() >= rows * self.lanes
                && step.accumulated.len() >= rows * step.value_dim
                && step.logits.len() >= self.query_rows * self.panel
                && step.weights.len() >= self.query_rows * KEY_TILE / depth
        );
        let attend = match step.packing {
            Packing::F32 => self.attend,
            Packing::Bf16Pairs => self.bf16_kernels().attend,
        };
        // SAFETY: the lengths are those that Step states, and a table is handed out only where its
        // instructions are available.
        unsafe { attend(step) }
    }

    /// Adds what every row of the step and its keys give to the gradients, in f32 whatever the table's packings are.
    /// Sums run in the order of the rows and of the keys.
    ///
    /// A row and a key that it does not see leave each other's gradients alone, whatever they hold.
    ///
    /// Panics when there are no rows or no keys, or a slice is shorter than it must be.
    pub fn attend_gradient(&self, step: &mut GradientStep<'_>) {
        let rows = step.delta.len();
        let (head_dim, value_dim) = (step.head_dim, step.value_dim);
        let (key_stride, value_stride) =
            (head_dim.next_multiple_of(self.lanes), value_dim.next_multiple_of(self.lanes));
        let keys = step.options.key_count;
        assert!(
            rows > 0
                && keys > 0
                && step.options.are_whole(rows)
                && step.query.len() >= rows * key_stride
                && step.keys.len() >= keys * key_stride
                && step.key_panels.len() >= KEY_TILE * head_dim
                && step.log2_sum.len() >= rows
                && step.query_gradient.len() >= rows * key_stride
                && step.key_gradient.len() >= keys * key_stride
                && step.weights.len() >= rows * KEY_TILE
                && step.logit_gradients.len() >= rows * KEY_TILE
        );
        assert!(
            !step.options.use_values
                || (step.output_gradient.len() >= rows * value_stride
                    && step.value_panels.len() >= KEY_TILE * value_dim
                    && step.value_gradient.len() >= keys * value_stride)
        );
        // SAFETY: the lengths are those that GradientStep states; as in `attend`.
        unsafe { (self.attend_gradient)(step) }
    }

    fn bf16_kernels(&self) -> Bf16Kernels {
        self.bf16.expect("this table has no kernels for bf16 pairs")
    }

    /// How much weight [`WEIGHING_QUERIES`] queries give to each key of a tile.
    ///
    /// Panics as [`Self::attend`] does.
    pub fn weigh(&self, task: &mut Weighing<'_>) {
        let words = task.head_dim.div_ceil(task.packing.depth());
        assert!(
            task.key_count <= KEY_TILE
                && task.query.len() >= WEIGHING_QUERIES * words
                && task.keys.len() >= KEY_TILE * words
                && task.start.len() >= WEIGHING_QUERIES
                && task.logits.len() >= self.query_rows * self.panel
                && task.weights.len() >= KEY_TILE
        );
        let weigh = match task.packing {
            Packing::F32 => self.weigh,
            Packing::Bf16Pairs => self.bf16_kernels().weigh,
        };
        // SAFETY: as in `attend`.
        unsafe { weigh(task) }
    }

    /// Sign codes of `rows` of f32 words under `projections` (`[head_dim][width]`, `width` a multiple of
    /// [`Self::lanes`], at most 32): bit j of a code is set when the projection on column j, summed by fused
    /// multiply-adds in ascending order of the head dimension, is greater than 0 (Definition 1 of the paper).
    /// Fastest in multiples of [`HASH_ROWS`].
    pub fn hash(&self, rows: &[&[u32]], projections: &[f32], width: usize, codes: &mut [u32]) {
        assert!(width > 0 && width.is_multiple_of(self.lanes) && width <= 32);
        let head_dim = projections.len() / width;
        assert!(
            projections.len() == head_dim * width
                && rows.len() == codes.len()
                && rows.iter().all(|row| row.len() >= head_dim)
        );
        // SAFETY: as in `attend`.
        unsafe { (self.hash)(rows, projections, width, codes) }
    }

    /// Packs [`Self::lanes`] rows as columns of a panel: word i of row j becomes `to[i * panel + j]` for
    /// the first `words` words. The rows hold `words` rounded up to the lanes.
    pub fn transpose(&self, rows: &[&[u32]], words: usize, to: &mut [u32]) {
        assert!(
            rows.len() == self.lanes
                && rows.iter().all(|row| row.len() >= words.next_multiple_of(self.lanes))
                && words > 0
                && to.len() >= (words - 1) * self.panel + self.lanes
        );
        // SAFETY: as in `attend`.
        unsafe { (self.transpose)(rows, words, to, self.panel) }
    }

    /// Packs R = [`Self::query_rows`] rows as a group of queries: word i of row r becomes `to[i * R + r]`,
    /// multiplied by `scale` as an f32 if there is one. The rows hold `words` rounded up to the lanes; up to L
    /// words beyond the group are overwritten.
    pub fn pack_queries(&self, rows: &[&[u32]], words: usize, scale: Option<f32>, to: &mut [u32]) {
        assert!(
            rows.len() == self.query_rows
                && rows.iter().all(|row| row.len() >= words.next_multiple_of(self.lanes))
                && to.len() >= words * self.query_rows + self.lanes
        );
        // SAFETY: as in `attend`.
        unsafe { (self.pack_queries)(rows, words, scale, to) }
    }

    /// Packs one row of words of the values as number `slot` of the `slots` of a tile (see [`Step::values`]);
    /// columns from `row.len()` on become 0.
    pub fn place(&self, row: &[u32], slot: usize, slots: usize, to: &mut [u32]) {
        assert!(slot < slots && to.len() >= slots * row.len().next_multiple_of(self.lanes));
        // SAFETY: as in `attend`.
        unsafe { (self.place)(row, slot, slots, to) }
    }

    /// Adds to `sum` the first `sum.len()` numbers of rows that are `stride` apart, each times its weight; rows
    /// of weight 0 are not looked at.
    pub fn add_weighted(&self, rows: &[f32], stride: usize, weights: &[f32], sum: &mut [f32]) {
        assert!(stride > 0 && sum.len() <= stride && rows.len() / stride >= weights.len());
        // SAFETY: as in `attend`.
        unsafe { (self.add_weighted)(rows, stride, weights, sum) }
    }

    /// Squared distances of packed `rows` from `center`.
    pub fn squared_distances(&self, rows: &[f32], center: &[f32], to: &mut [f32]) {
        assert!(!center.is_empty() && rows.len() / center.len() >= to.len());
        // SAFETY: as in `attend`.
        unsafe { (self.squared_distances)(rows, center, to) }
    }

    /// What all elements of a part of a mask say: rows that are some bytes apart, of `count` elements one after the
    /// other.
    ///
    /// # Safety
    /// They are readable.
    pub(crate) unsafe fn survey_mask(
        &self,
        dtype: DType,
        from: *const u8,
        rows: (usize, isize),
        count: usize,
    ) -> MaskSurvey {
        // SAFETY: the elements are readable (contract); as in `attend`.
        unsafe { (self.survey_mask)(dtype, from, rows, count) }
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
                DType::BF16 => rows::widen_bf16(from, to),
            }
        }
    }
}
