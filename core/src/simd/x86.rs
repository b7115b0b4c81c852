//! What the x86-64 vectors share: the operations that are one instruction each, whatever the width.

/// The one-instruction methods of [`super::vector::Vector`] for a wrapper of an x86 vector type.
macro_rules! x86_operations {
    (
        $vector:ident, $splat:ident, $load:ident, $store:ident, $add:ident, $sub:ident, $mul:ident, $mul_add:ident,
        $max:ident, $min:ident
    ) => {
        #[inline(always)]
        fn splat(x: f32) -> Self {
            // SAFETY: see the impl.
            $vector(unsafe { $splat(x) })
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            // SAFETY: see the impl.
            $vector(unsafe { $load(from) })
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            // SAFETY: see the impl.
            unsafe { $store(to, self.0) }
        }

        #[inline(always)]
        fn add(self, other: Self) -> Self {
            // SAFETY: see the impl.
            $vector(unsafe { $add(self.0, other.0) })
        }

        #[inline(always)]
        fn sub(self, other: Self) -> Self {
            // SAFETY: see the impl.
            $vector(unsafe { $sub(self.0, other.0) })
        }

        #[inline(always)]
        fn mul(self, other: Self) -> Self {
            // SAFETY: see the impl.
            $vector(unsafe { $mul(self.0, other.0) })
        }

        #[inline(always)]
        fn mul_add(self, factor: Self, term: Self) -> Self {
            // SAFETY: see the impl.
            $vector(unsafe { $mul_add(self.0, factor.0, term.0) })
        }

        #[inline(always)]
        fn fused_mul_add(self, factor: Self, term: Self) -> Self {
            self.mul_add(factor, term)
        }

        // The instruction returns its second operand where either is NaN, as the trait asks.
        #[inline(always)]
        fn max(self, other: Self) -> Self {
            // SAFETY: see the impl.
            $vector(unsafe { $max(self.0, other.0) })
        }

        #[inline(always)]
        fn min(self, other: Self) -> Self {
            // SAFETY: see the impl.
            $vector(unsafe { $min(self.0, other.0) })
        }
    };
}
pub(super) use x86_operations;
