//! The accuracy of 2^x, seen through the weights of a step.

use hyperattn_conformance::for_each_table;
use hyperattn_conformance::packing::{Keys, State};
use hyperattn_core::Kernels;
use hyperattn_core::simd::{KEY_TILE, Packing};

/// The weights of `exponents`, all at most 8, relative to a maximum of 0.
fn weights(kernels: &'static Kernels, exponents: &[f32]) -> Vec<f32> {
    let identity = |index: usize| f32::from(index / KEY_TILE == index % KEY_TILE);
    let values: Vec<f32> = (0..KEY_TILE * KEY_TILE).map(identity).collect();
    let of_tile = |tile: &[f32]| {
        let mut state = State::new(kernels, Packing::F32, &[1.0], 1, KEY_TILE);
        state.set_sum(0, 0.0, 1.0);
        state.attend(Keys {
            keys: tile,
            values: &values[..tile.len() * KEY_TILE],
            shift: 0.0,
            log_weight: None,
            visible: None,
            mask: None,
            cap: None,
            use_sum: true,
            use_values: true,
        });
        assert_eq!(state.max[0], 0.0);
        state.accumulated(0)[..tile.len()].to_vec()
    };
    exponents.chunks(KEY_TILE).flat_map(of_tile).collect()
}

/// Numbers in [-127.5, 8]: a fine grid, all neighbourhoods of integers and of halves, small magnitudes.
fn exponents() -> Vec<f32> {
    let mut exponents: Vec<f32> = (0..400_000).map(|i| 8.0 - 135.5 * (i as f32 / 400_000.0)).collect();
    for half in -16..=254 {
        let centre = -(half as f32) / 2.0;
        let (mut up, mut down) = (centre, centre);
        for _ in 0..40 {
            exponents.extend([up, down]);
            (up, down) = (up.next_up(), down.next_down());
        }
    }
    exponents.extend((0..140).flat_map(|power| [0.5f32.powi(power), -(0.5f32.powi(power))]));
    exponents.retain(|&x| x <= 8.0);
    exponents
}

#[test]
fn weights_are_within_2_ulp_down_to_the_smallest_normal_number() {
    let exponents = exponents();
    for_each_table(|kernels| {
        let (mut worst_ulp, mut worst_below) = ((0.0, 0.0), 0.0f64);
        for (&x, weight) in exponents.iter().zip(weights(kernels, &exponents)) {
            let truth = f64::from(x).exp2();
            let error = (f64::from(weight) - truth).abs();
            if x >= -126.0 {
                let ulp = (f64::from(x).floor() - 23.0).exp2();
                if error / ulp > worst_ulp.0 {
                    worst_ulp = (error / ulp, x);
                }
            } else {
                worst_below = worst_below.max(error);
            }
        }
        println!("at most {:.3} ulp (x = {}), {worst_below:e} below -126", worst_ulp.0, worst_ulp.1);
        assert!(worst_ulp.0 <= 2.0);
        assert!(worst_below <= (-126.0f64).exp2());
    });
}

#[test]
fn integers_are_exact() {
    let exponents: Vec<f32> = (-8..=126).map(|n| -(n as f32)).collect();
    for_each_table(|kernels| {
        for (&x, weight) in exponents.iter().zip(weights(kernels, &exponents)) {
            assert_eq!(f64::from(weight), f64::from(x).exp2(), "2^{x}");
        }
    });
}

#[test]
fn far_below_is_0_and_nan_stays() {
    let exponents = [-127.0, -128.0, -1000.0, -1e30, f32::MIN, f32::NEG_INFINITY];
    for_each_table(|kernels| {
        assert!(weights(kernels, &exponents).iter().all(|&weight| weight.to_bits() == 0));
        // 0 * NaN: every column of the product sees the NaN weight.
        assert!(weights(kernels, &[0.0, f32::NAN, -1.0]).iter().all(|weight| weight.is_nan()));
    });
}
