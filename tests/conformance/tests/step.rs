//! The attention kernel of every table, step by step, against f64.

use std::f64::consts::LOG2_E;

use hyperattn_conformance::for_each_packing;
use hyperattn_conformance::packing::{Keys, State};
use hyperattn_core::simd::{KEY_TILE, Packing};
use hyperattn_core::{Kernels, bf16};
use hyperattn_reference::Generator;

/// What entered one row: (base-2 logit with weight, value, whether summed, whether multiplied).
type Entries = Vec<(f64, Vec<f64>, bool, bool)>;

/// See [`Chain::check`].
const LOGIT_TOLERANCE: f64 = 3e-5;

/// One chain of steps of random shape.
struct Chain {
    kernels: &'static Kernels,
    packing: Packing,
    head_dim: usize,
    value_dim: usize,
    query: Vec<f32>,
    state: State,
    entries: Vec<Entries>,
    /// Whether no step multiplies: a step for sums alone leaves the product as it is, even where the
    /// maximum that it is relative to rises, so that such steps do not mix with others.
    sums_only: bool,
}

/// Normal numbers that `packing` can hold.
fn normals(generator: &mut Generator, packing: Packing, len: usize) -> Vec<f32> {
    let number = |x: f64| match packing {
        Packing::F32 => x as f32,
        Packing::Bf16Pairs => bf16::from_f64(x).to_f32(),
    };
    (0..len).map(|_| number(generator.normal())).collect()
}

impl Chain {
    fn new(kernels: &'static Kernels, packing: Packing, generator: &mut Generator) -> Self {
        let head_dim = [1, 2, 5, 64, 80][generator.below(5)];
        let value_dim = [1, 7, 16, 33][generator.below(4)];
        let rows = 1 + generator.below(29);
        let query = normals(generator, packing, rows * head_dim);
        let state = State::new(kernels, packing, &query, head_dim, value_dim);
        let sums_only = generator.below(4) == 0;
        Chain {
            kernels,
            packing,
            head_dim,
            value_dim,
            query,
            state,
            entries: vec![Vec::new(); rows],
            sums_only,
        }
    }

    /// One step on random keys, with a random choice of options.
    fn step(&mut self, count: usize, generator: &mut Generator) {
        let (rows, d) = (self.entries.len(), self.head_dim);
        let keys = normals(generator, self.packing, count * d);
        let values = normals(generator, self.packing, count * self.value_dim);
        let empty = f32::NEG_INFINITY;
        let log_weight: Option<Vec<f32>> = (generator.below(2) == 0).then(|| {
            let weight = |g: &mut Generator| if g.below(5) == 0 { empty } else { 3.0 * g.normal() as f32 };
            (0..count).map(|_| weight(generator)).collect()
        });
        let visible: Option<Vec<u32>> = (generator.below(2) == 0)
            .then(|| (0..rows).map(|_| generator.below(count + 2).min(KEY_TILE) as u32).collect());
        let shift = if generator.below(3) == 0 { 4.0 * generator.normal() as f32 } else { 0.0 };
        // Some keys that a row does not see, and logits to go with base 2.
        let mask: Option<Vec<f32>> = (generator.below(3) == 0).then(|| {
            let hidden = [empty, f32::MIN];
            let entry = |g: &mut Generator| match g.below(5) {
                0 => hidden[g.below(2)],
                1 => 0.0,
                _ => 2.0 * g.normal() as f32,
            };
            (0..rows * count).map(|_| entry(generator)).collect()
        });
        let cap: Option<Vec<f32>> = (generator.below(3) == 0).then(|| {
            let caps = [empty, f32::INFINITY, -1.5, 0.25];
            (0..rows).map(|_| caps[generator.below(4)]).collect()
        });
        let (use_sum, use_values) =
            if self.sums_only { (true, false) } else { (generator.below(3) > 0, true) };
        for r in 0..rows {
            let limit = visible.as_ref().map_or(count, |visible| (visible[r] as usize).min(count));
            for j in 0..limit {
                let pairs = self.query[r * d..][..d].iter().zip(&keys[j * d..][..d]);
                let logit: f64 = pairs.map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
                let added = mask.as_ref().map_or(0.0, |mask| f64::from(mask[r * count + j]));
                let logit = if added < -1e38 { f64::from(empty) } else { logit + added * LOG2_E };
                let capped = cap.as_ref().map_or(logit, |cap| logit.min(cap[r].into()));
                let weighted =
                    capped + f64::from(shift) + log_weight.as_ref().map_or(0.0, |weights| weights[j].into());
                let value = &values[j * self.value_dim..][..self.value_dim];
                let value = value.iter().map(|&x| x.into()).collect();
                self.entries[r].push((weighted, value, use_sum, use_values));
            }
        }
        self.state.attend(Keys {
            keys: &keys,
            values: &values,
            shift,
            log_weight: log_weight.as_deref(),
            visible: visible.as_deref(),
            mask: mask.as_deref(),
            cap: cap.as_deref(),
            use_sum,
            use_values,
        });
    }

    /// Sums and numerators against f64, relative to the sum of the absolute terms. A logit is a chain of up to 80
    /// sums from the row's largest, which is up to 64 in magnitude: with independent roundings it is off by some
    /// 2^-24 * 64 * sqrt(80) / sqrt(3) = 2e-5, and the rest is smaller. Weights that are multiplied as
    /// bf16 are rounded to 8 bits, an error of at most 2^-8, when their panel of the tile is done and again
    /// wherever a later panel rescales them.
    fn check(&self) {
        let multiplied_tolerance = match self.packing {
            Packing::F32 => LOGIT_TOLERANCE,
            Packing::Bf16Pairs => (KEY_TILE / self.kernels.panel()) as f64 / 256.0,
        };
        for (r, entries) in self.entries.iter().enumerate() {
            let largest = entries.iter().map(|entry| entry.0).fold(f64::NEG_INFINITY, f64::max);
            let max = f64::from(self.state.max[r]);
            assert!(
                max == largest || (max - LOGIT_TOLERANCE..=max + 8.0 + LOGIT_TOLERANCE).contains(&largest),
                "row {r}: the weights are relative to {max}, the largest logit is {largest}"
            );
            let weight = |logit: f64| if max == f64::NEG_INFINITY { 0.0 } else { (logit - max).exp2() };
            let near = |actual: f32, terms: &[f64], tolerance: f64| {
                let (sum, scale): (f64, f64) = (terms.iter().sum(), terms.iter().map(|x| x.abs()).sum());
                let error = (f64::from(actual) - sum).abs();
                assert!(error <= tolerance * scale, "row {r}: {actual} should be {sum}, terms of {scale}");
            };
            let summed = entries.iter().filter(|entry| entry.2).map(|entry| weight(entry.0));
            near(self.state.sum(r), &summed.collect::<Vec<f64>>(), LOGIT_TOLERANCE);
            for column in 0..self.value_dim {
                let multiplied = entries.iter().filter(|entry| entry.3);
                let terms: Vec<f64> = multiplied.map(|entry| weight(entry.0) * entry.1[column]).collect();
                near(self.state.accumulated(r)[column], &terms, multiplied_tolerance);
            }
            assert!(self.state.accumulated(r)[self.value_dim..].iter().all(|&x| x == 0.0));
        }
        assert!(self.state.max.len().is_multiple_of(self.kernels.row_multiple()));
    }
}

#[test]
fn steps_agree_with_f64() {
    let seed = 110;
    println!("seed {seed}");
    for_each_packing(|kernels, packing| {
        let mut generator = Generator::new(seed);
        for count in (1..=KEY_TILE).cycle().take(6 * KEY_TILE) {
            let mut chain = Chain::new(kernels, packing, &mut generator);
            chain.step(count, &mut generator);
            chain.check();
            for _ in 0..generator.below(4) {
                let next = 1 + generator.below(KEY_TILE);
                chain.step(next, &mut generator);
                chain.check();
            }
        }
    });
}

/// One query (1) against keys that are their own logits.
fn attend(state: &mut State, logits: &[f32], values: &[f32], visible: Option<&[u32]>) {
    let keys = Keys {
        keys: logits,
        values,
        shift: 0.0,
        log_weight: None,
        visible,
        mask: None,
        cap: None,
        use_sum: true,
        use_values: true,
    };
    state.attend(keys);
}

#[test]
fn logits_of_minus_infinity_have_no_weight_and_leave_a_row_empty() {
    for_each_packing(|kernels, packing| {
        let empty = f32::NEG_INFINITY;
        let mut state = State::new(kernels, packing, &[1.0], 1, 1);
        attend(&mut state, &[empty; 5], &[1.0; 5], None);
        assert_eq!((state.max[0], state.sum(0), state.accumulated(0)[0]), (empty, 0.0, 0.0));
        attend(&mut state, &[empty, 3.0, empty, 2.0], &[8.0, 4.0, 8.0, 2.0], None);
        assert_eq!((state.max[0], state.sum(0), state.accumulated(0)[0]), (3.0, 1.5, 5.0));
        attend(&mut state, &[empty; 64], &[1.0; 64], None);
        assert_eq!((state.max[0], state.sum(0), state.accumulated(0)[0]), (3.0, 1.5, 5.0));
    });
}

/// Whatever a hidden key or its value holds, and a NaN in the mask goes where one in the key does.
#[test]
fn the_mask_decides_which_nan_a_row_sees() {
    for_each_packing(|kernels, packing| {
        let (hidden, count) = (f32::NEG_INFINITY, 37);
        for (nan_key, nan_value, nan_mask) in [(5, 9, None), (0, 36, None), (7, 7, Some(8)), (0, 0, Some(36))]
        {
            let rows = 8;
            let (mut keys, mut values) = (vec![0.0; count], vec![1.0; count]);
            keys[nan_key] = f32::NAN;
            values[nan_value] = f32::INFINITY;
            let mut mask = vec![0.0; rows * count];
            // Row 0 sees all, row 1 neither the key nor the value, row 2 not the key, row 3 not the value; row 4 has a NaN
            // of its own, row 5 sees nothing.
            for (row, key) in
                [(1, nan_key), (1, nan_value), (2, nan_key), (3, nan_value), (4, nan_key), (4, nan_value)]
            {
                mask[row * count + key] = hidden;
            }
            if let Some(key) = nan_mask {
                mask[4 * count + key] = f32::NAN;
            }
            mask[5 * count..6 * count].fill(hidden);
            let mut state = State::new(kernels, packing, &vec![1.0; rows], 1, 1);
            let keys = Keys {
                keys: &keys,
                values: &values,
                shift: 0.0,
                log_weight: None,
                visible: None,
                mask: Some(&mask),
                cap: None,
                use_sum: true,
                use_values: true,
            };
            state.attend(keys);
            let seen = (count - if nan_key == nan_value { 1 } else { 2 }) as f32;
            let clean = |row: usize| (state.sum(row), state.accumulated(row)[0]) == (seen, seen);
            assert!(state.sum(0).is_nan() && state.accumulated(0)[0].is_nan());
            assert!(clean(1), "{} {}", state.sum(1), state.accumulated(1)[0]);
            if nan_key != nan_value {
                assert_eq!((state.sum(2), state.accumulated(2)[0]), (seen + 1.0, f32::INFINITY));
                assert!(state.sum(3).is_nan());
            }
            assert_eq!(state.sum(4).is_nan() && state.accumulated(4)[0].is_nan(), nan_mask.is_some());
            assert_eq!((state.max[5], state.sum(5), state.accumulated(5)[0]), (hidden, 0.0, 0.0));
        }
    });
}

/// The first logits of a row may lie anywhere: there is nothing yet that is relative to something else.
#[test]
fn logits_far_below_zero_are_a_row_s_first() {
    for_each_packing(|kernels, packing| {
        for logit in [-100.0, -127.0, -128.0, -129.0, -255.0, -256.0, -1024.0, -1e30] {
            let mut state = State::new(kernels, packing, &[1.0], 1, 1);
            let logit = bf16::from_f32(logit).to_f32();
            attend(&mut state, &[logit], &[3.0], None);
            assert_eq!((state.max[0], state.sum(0), state.accumulated(0)[0]), (logit, 1.0, 3.0));
            attend(&mut state, &[0.0], &[2.0], None);
            let before = logit.exp2();
            assert_eq!(state.max[0], 0.0);
            assert!((state.sum(0) - 1.0 - before).abs() <= f32::EPSILON, "{logit}");
        }
    });
}

#[test]
fn nan_reaches_the_rows_that_see_it_and_no_others() {
    for_each_packing(|kernels, packing| {
        for rows in 1..=9 {
            let query = vec![1.0; rows];
            // Row r sees r keys; key 4 is NaN, then value 4.
            let visible: Vec<u32> = (0..rows as u32).collect();
            for nan_key in [true, false] {
                let mut state = State::new(kernels, packing, &query, 1, 1);
                let (mut keys, mut values) = (vec![0.0; 8], vec![1.0; 8]);
                *if nan_key { &mut keys[4] } else { &mut values[4] } = f32::NAN;
                attend(&mut state, &keys, &values, Some(&visible));
                attend(&mut state, &[0.0; 8], &[1.0; 8], None);
                for r in 0..rows {
                    let (sum, product) = (state.sum(r), state.accumulated(r)[0]);
                    let seen = r > 4;
                    assert_eq!(product.is_nan(), seen, "row {r}: {product}");
                    assert_eq!(sum.is_nan(), seen && nan_key, "row {r}: {sum}");
                    if !seen {
                        assert_eq!((sum, product), (r as f32 + 8.0, r as f32 + 8.0));
                    }
                }
            }
        }
    });
}
