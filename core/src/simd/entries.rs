//! A table: the generic kernels, compiled for one vector type and its instructions.

/// Defines the entry points for a vector, with ROWS, VECTORS and TAIL of a register tile, the queries that weigh keys
/// together, and the rows of a register tile of the backward pass, under the target features that it needs; and the
/// table of them.
macro_rules! kernel_table {
    ($isa:ident, $vector:ty, $rows:literal, $vectors:literal, $tail:literal, $weighing:literal,
     $gradient:literal $(, $features:literal)?) => {
        $(#[target_feature(enable = $features)])?
        unsafe fn attend(step: &mut crate::simd::Step<'_>) {
            // SAFETY: the caller's contract is that of the generic kernel; the instructions are enabled here.
            unsafe { crate::simd::generic::attend::<crate::simd::product::F32<$vector>, $rows, $vectors, $tail>(step) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn weigh(task: &mut crate::simd::Weighing<'_>) {
            // SAFETY: as above.
            unsafe { crate::simd::generic::weigh::<crate::simd::product::F32<$vector>, $weighing, $vectors>(task) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn attend_gradient(step: &mut crate::simd::GradientStep<'_>) {
            // SAFETY: as above.
            unsafe { crate::simd::gradient::attend_gradient::<$vector, $gradient, $vectors>(step) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn hash(rows: &[&[u32]], projections: &[f32], width: usize, codes: &mut [u32]) {
            // SAFETY: as above.
            unsafe { crate::simd::rows::hash::<$vector>(rows, projections, width, codes) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn transpose(rows: &[&[u32]], words: usize, to: &mut [u32], panel: usize) {
            // SAFETY: as above.
            unsafe { crate::simd::rows::transpose::<$vector>(rows, words, to, panel) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn pack_queries(rows: &[&[u32]], words: usize, scale: Option<f32>, to: &mut [u32]) {
            // SAFETY: as above.
            unsafe { crate::simd::rows::pack_queries::<$vector, $rows>(rows, words, scale, to) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn place(row: &[u32], slot: usize, slots: usize, to: &mut [u32]) {
            // SAFETY: as above.
            unsafe { crate::simd::rows::place::<$vector, $vectors>(row, slot, slots, to) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn add_weighted(rows: &[f32], stride: usize, weights: &[f32], sum: &mut [f32]) {
            // SAFETY: as above.
            unsafe { crate::simd::rows::add_weighted::<$vector>(rows, stride, weights, sum) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn squared_distances(rows: &[f32], center: &[f32], to: &mut [f32]) {
            // SAFETY: as above.
            unsafe { crate::simd::rows::squared_distances::<$vector>(rows, center, to) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn widen_f16(from: *const u8, to: &mut [f32]) {
            // SAFETY: as above.
            unsafe { crate::simd::rows::widen_f16::<$vector>(from, to) }
        }

        $(#[target_feature(enable = $features)])?
        unsafe fn survey_mask(
            dtype: crate::element::DType,
            from: *const u8,
            rows: (usize, isize),
            count: usize,
        ) -> crate::simd::MaskSurvey {
            // SAFETY: as above.
            unsafe { crate::simd::mask::survey(dtype, from, rows, count) }
        }

        pub(super) const TABLE: crate::simd::Kernels = crate::simd::Kernels {
            isa: crate::simd::Isa::$isa,
            query_rows: $rows,
            row_multiple: $tail,
            panel: $vectors * <$vector as crate::simd::vector::Vector>::LANES,
            lanes: <$vector as crate::simd::vector::Vector>::LANES,
            attend,
            weigh,
            attend_gradient,
            bf16: None,
            hash,
            transpose,
            pack_queries,
            place,
            add_weighted,
            squared_distances,
            widen_f16,
            survey_mask,
        };

        pub(super) static KERNELS: crate::simd::Kernels = TABLE;
    };
}
pub(super) use kernel_table;
