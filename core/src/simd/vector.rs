//! The operations that a kernel needs from an instruction set. Kernels are written once over this trait.

/// A vector of f32 lanes.
///
/// Every method is inlined into a function that enables the instruction set; calling one anywhere
/// else on a machine without it is undefined behaviour, so construction is confined to kernels.
pub(crate) trait Vector: Copy {
    /// Number of lanes.
    const LANES: usize;

    /// All lanes equal.
    fn splat(x: f32) -> Self;

    /// Lane `i` holds `i`.
    fn iota() -> Self;

    /// # Safety
    /// `LANES` numbers are readable at `from`.
    unsafe fn load(from: *const f32) -> Self;

    /// Widens binary16 numbers.
    ///
    /// # Safety
    /// `2 * LANES` bytes are readable at `from`.
    unsafe fn load_f16(from: *const u8) -> Self;

    /// # Safety
    /// `LANES` numbers are writable at `to`.
    unsafe fn store(self, to: *mut f32);

    /// `self + other`.
    fn add(self, other: Self) -> Self;

    /// `self - other`.
    fn sub(self, other: Self) -> Self;

    /// `self * other`.
    fn mul(self, other: Self) -> Self;

    /// `self * factor + term`, rounded once or twice, whichever is fast.
    fn mul_add(self, factor: Self, term: Self) -> Self;

    /// `self * factor + term`, rounded once: the same bits on every instruction set.
    fn fused_mul_add(self, factor: Self, term: Self) -> Self;

    /// The larger; `other` where either is NaN.
    fn max(self, other: Self) -> Self;

    /// The smaller; `other` where either is NaN.
    fn min(self, other: Self) -> Self;

    /// `self` in lanes where `a < b`, else `other`.
    fn select_less(self, other: Self, a: Self, b: Self) -> Self;

    /// Bit `i` is set when lane `i` is greater than 0.
    fn positive_bits(self) -> u32;

    /// The largest lane; unspecified when a lane is NaN.
    fn reduce_max(self) -> f32;

    /// Transposes the square of `LANES` columns from `column` on of `LANES` rows of words, of which the first
    /// `columns` columns are stored as rows.
    ///
    /// # Safety
    /// There are `LANES` rows of at least `column + LANES` words, and `LANES` words are writable at each of
    /// `columns` (at most `LANES`) rows, `to_stride` apart at `to`.
    unsafe fn transpose(rows: &[&[u32]], column: usize, to: *mut u32, to_stride: usize, columns: usize);

    /// 2 to the power of each lane, for lanes up to 127 (NaN stays NaN).
    ///
    /// At most 2 ulp off from -126 on and correct to 2^-126 below. The result is 0 from -127 on.
    #[inline(always)]
    fn exp2(self) -> Self {
        let x = Self::splat(EXP2_LOWEST).max(self);
        let rounded = x.add(Self::splat(EXP2_ROUND));
        let f = x.sub(rounded.sub(Self::splat(EXP2_ROUND)));
        let mut power = Self::splat(EXP2[5]);
        for c in [EXP2[4], EXP2[3], EXP2[2], EXP2[1], EXP2[0], 1.0] {
            power = power.mul_add(f, Self::splat(c));
        }
        power.mul(rounded.low_bits_as_exponent())
    }

    /// The numbers whose exponent fields are the low bits of these: 2^n for `EXP2_ROUND + n`.
    fn low_bits_as_exponent(self) -> Self;
}

/// Coefficients of 2^f - 1 = f c_1 + ... + f^6 c_6 on [-1/2, 1/2]: the minimax polynomial of the
/// relative error, 2.6e-9.
const EXP2: [f32; 6] =
    [core::f32::consts::LN_2, 0.240_226_53, 0.055_503_106, 0.009_617_693, 0.001_340_664_4, 0.000_155_946_81];

/// Adding this to |x| < 2^22 rounds x to an integer, whose value plus the exponent's bias is then in
/// the low bits.
const EXP2_ROUND: f32 = 12_582_912.0 + 127.0;

/// Below this, 2^x is 0.
const EXP2_LOWEST: f32 = -127.0;
