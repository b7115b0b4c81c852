//! What a register tile multiplies: 32-bit words, each one f32 or a pair of bf16.

use core::marker::PhantomData;

use super::vector::Vector;

/// How packed words are multiplied and summed.
///
/// As with [`Vector`], methods are inlined into functions that enable the instructions.
pub(crate) trait Product {
    /// Sums and weights.
    type Vector: Vector;
    /// A vector of words.
    type Operand: Copy;
    /// Elements in a word.
    const DEPTH: usize;
    /// Whether the scale is in the query words already; else it is applied to the finished products.
    const QUERIES_ARE_SCALED: bool;

    /// # Safety
    /// A vector of words is readable at `from`.
    unsafe fn load(from: *const u32) -> Self::Operand;

    /// All words equal.
    fn splat(word: u32) -> Self::Operand;

    /// `sum` plus the products of the elements of `a` and `b`.
    fn multiply_add(a: Self::Operand, b: Self::Operand, sum: Self::Vector) -> Self::Vector;

    /// Stores one row's weights of a panel as words, in key order.
    ///
    /// # Safety
    /// `VECTORS * LANES / DEPTH` words are writable at `to`.
    unsafe fn store_weights<const VECTORS: usize>(weights: [Self::Vector; VECTORS], to: *mut u32);

    /// Element `index` of every word.
    fn element(words: Self::Operand, index: usize) -> Self::Vector;

    /// A word whose elements are those of `word`, each multiplied by `factor`.
    #[inline(always)]
    fn scale_word(word: u32, factor: f32) -> u32 {
        let scaled = |index| Self::element_of(word, index) * factor;
        if Self::DEPTH == 1 {
            return scaled(0).to_bits();
        }
        let rounded = |index| u32::from(half::bf16::from_f32(scaled(index)).to_bits());
        rounded(0) | rounded(1) << 16
    }

    /// Element `index` of a word.
    #[inline(always)]
    fn element_of(word: u32, index: usize) -> f32 {
        f32::from_bits(match (Self::DEPTH, index) {
            (1, _) => word,
            (_, 0) => word << 16,
            _ => word & 0xffff_0000,
        })
    }
}

/// f32 words.
pub(crate) struct F32<V>(PhantomData<V>);

impl<V: Vector> Product for F32<V> {
    type Vector = V;
    type Operand = V;
    const DEPTH: usize = 1;
    const QUERIES_ARE_SCALED: bool = true;

    #[inline(always)]
    unsafe fn load(from: *const u32) -> V {
        // SAFETY: the caller's contract.
        unsafe { V::load(from.cast()) }
    }

    #[inline(always)]
    fn splat(word: u32) -> V {
        V::splat(f32::from_bits(word))
    }

    #[inline(always)]
    fn multiply_add(a: V, b: V, sum: V) -> V {
        a.mul_add(b, sum)
    }

    #[inline(always)]
    unsafe fn store_weights<const VECTORS: usize>(weights: [V; VECTORS], to: *mut u32) {
        for (v, weight) in weights.into_iter().enumerate() {
            // SAFETY: v < VECTORS.
            unsafe { weight.store(to.add(v * V::LANES).cast()) };
        }
    }

    #[inline(always)]
    fn element(words: V, _index: usize) -> V {
        words
    }
}
