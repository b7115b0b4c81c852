//! Elementary functions on single numbers. The kernels have their own over vectors (simd).

/// log2(e).
pub(crate) const LOG2_E: f32 = core::f32::consts::LOG2_E;

/// log2 of a non-negative number, -inf at 0.
pub(crate) fn log2(x: f32) -> f32 {
    libm::log2f(x)
}

/// 2^x.
pub(crate) fn exp2(x: f32) -> f32 {
    libm::exp2f(x)
}

/// log2(2^a + 2^b); an argument of -inf is neutral, NaN stays.
pub(crate) fn log2_add(a: f32, b: f32) -> f32 {
    if a.is_nan() || b.is_nan() {
        return f32::NAN;
    }
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if low == f32::NEG_INFINITY || high == f32::INFINITY {
        return high;
    }
    high + log2(1.0 + exp2(low - high))
}

/// Two independent standard normal numbers from two uniform 64-bit numbers (Box-Muller).
///
/// Only IEEE additions, multiplications, divisions and square roots in a fixed order, so every
/// machine (and a GPU told not to contract) gives the same bits. |error| < 1e-12 before the final rounding.
pub(crate) fn normal_pair(radius: u64, angle: u64) -> [f32; 2] {
    // (0, 1]: the logarithm stays finite. The largest result is sqrt(2 * 53 * ln 2) = 8.6.
    let u = ((radius >> 11) + 1) as f64 * (1.0 / (1u64 << 53) as f64);
    let r = libm::sqrt(-2.0 * ln(u));
    let (sin, cos) = sin_cos_turns(angle);
    [(r * cos) as f32, (r * sin) as f32]
}

/// ln of a number in [2^-53, 1].
fn ln(x: f64) -> f64 {
    let bits = x.to_bits();
    let mut exponent = (bits >> 52) as i64 - 1023;
    let mut mantissa = f64::from_bits((bits & ((1 << 52) - 1)) | (1023 << 52));
    if mantissa > core::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    // 2 atanh(t), |t| <= 0.1716: the series' 12th odd term is below 1e-18.
    let t = (mantissa - 1.0) / (mantissa + 1.0);
    let square = t * t;
    let mut sum = 0.0;
    for k in (0..12).rev() {
        sum = sum * square + 1.0 / (2 * k + 1) as f64;
    }
    exponent as f64 * core::f64::consts::LN_2 + 2.0 * t * sum
}

/// sin and cos of `2 pi turns / 2^64`.
fn sin_cos_turns(turns: u64) -> (f64, f64) {
    // Within an eighth of a turn of the nearest quarter; Taylor to below 1e-16 there.
    let quarter = turns.wrapping_add(1 << 61) >> 62;
    let rest = turns.wrapping_sub(quarter << 62) as i64;
    let x = rest as f64 * (core::f64::consts::TAU / 18_446_744_073_709_551_616.0);
    let square = x * x;
    let series = |first: u32| {
        let mut sum = 0.0;
        for k in (0..9).rev() {
            let n = f64::from(2 * k + first);
            sum = 1.0 - square / ((n + 1.0) * (n + 2.0)) * sum;
        }
        sum
    };
    let (cos, sin) = (series(0), x * series(1));
    match quarter {
        0 => (sin, cos),
        1 => (cos, -sin),
        2 => (-sin, -cos),
        _ => (-cos, sin),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn box_muller_parts_match_libm() {
        for i in 1..2000u64 {
            let x = i as f64 / 2000.0;
            assert!((ln(x) - libm::log(x)).abs() < 1e-13 * libm::log(x).abs().max(1.0), "ln {x}");
            let turns = i.wrapping_mul(0x9E37_79B9_7F4A_7C15);
            let angle = turns as f64 / 18_446_744_073_709_551_616.0 * core::f64::consts::TAU;
            let (sin, cos) = sin_cos_turns(turns);
            assert!((sin - libm::sin(angle)).abs() < 1e-12 && (cos - libm::cos(angle)).abs() < 1e-12);
        }
        assert!((ln(1.0 / (1u64 << 53) as f64) + 53.0 * core::f64::consts::LN_2).abs() < 1e-12);
    }

    #[test]
    fn log2_add_has_a_neutral_element_and_keeps_nan() {
        assert_eq!(log2_add(3.0, f32::NEG_INFINITY), 3.0);
        assert_eq!(log2_add(f32::NEG_INFINITY, -2.0), -2.0);
        assert_eq!(log2_add(f32::NEG_INFINITY, f32::NEG_INFINITY), f32::NEG_INFINITY);
        assert_eq!(log2_add(1.0, 1.0), 2.0);
        assert_eq!(log2_add(500.0, 0.0), 500.0);
        assert!(log2_add(f32::NAN, 0.0).is_nan() && log2_add(0.0, f32::NAN).is_nan());
        assert!(log2_add(f32::NAN, f32::NEG_INFINITY).is_nan());
    }
}
