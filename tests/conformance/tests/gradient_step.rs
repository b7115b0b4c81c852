//! The kernel of the backward pass of every table, step by step, against f64.

use std::f64::consts::{LN_2, LOG2_E};

use hyperattn_conformance::for_each_table;
use hyperattn_conformance::gradient_step::{GradientInputs, StepGradients};
use hyperattn_core::Kernels;
use hyperattn_core::simd::KEY_TILE;
use hyperattn_reference::Generator;

fn normals(generator: &mut Generator, len: usize) -> Vec<f32> {
    (0..len).map(|_| generator.normal() as f32).collect()
}

/// `Some` in one of `of` cases.
fn sometimes<T>(generator: &mut Generator, of: usize, make: impl FnOnce(&mut Generator) -> T) -> Option<T> {
    (generator.below(of) == 0).then(|| make(generator))
}

/// A step without options, whose rows' sums are about those of the keys.
fn plain_inputs(
    generator: &mut Generator,
    (rows, count): (usize, usize),
    (d, dv): (usize, usize),
) -> GradientInputs {
    let rest = 3.0 * generator.normal() as f32;
    GradientInputs {
        head_dim: d,
        value_dim: dv,
        scale_log2: (LOG2_E / (d as f64).sqrt()) as f32,
        query: normals(generator, rows * d),
        output_gradient: normals(generator, rows * dv),
        keys: normals(generator, count * d),
        values: normals(generator, count * dv),
        shift: 0.0,
        log_weight: None,
        visible: None,
        mask: None,
        cap: None,
        use_sum: true,
        use_values: true,
        log2_sum: (0..rows).map(|_| (count as f32).log2() + rest + generator.normal() as f32).collect(),
        delta: normals(generator, rows),
    }
}

/// Options that keep rows and keys apart.
fn hide(inputs: &mut GradientInputs, generator: &mut Generator) {
    let (rows, count) = (inputs.rows(), inputs.key_count());
    inputs.visible = sometimes(generator, 2, |g| match g.below(3) {
        // The diagonal of a causal mask.
        0 => {
            let first = g.below(count + rows);
            (0..rows).map(|r| (first + r).saturating_sub(rows).min(KEY_TILE) as u32).collect()
        }
        _ => (0..rows).map(|_| g.below(count + 2).min(KEY_TILE) as u32).collect(),
    });
    inputs.mask = sometimes(generator, 3, |g| {
        let hidden = [f32::NEG_INFINITY, f32::MIN];
        let entry = |g: &mut Generator| match g.below(5) {
            0 => hidden[g.below(2)],
            1 => 0.0,
            _ => 2.0 * g.normal() as f32,
        };
        (0..rows * count).map(|_| entry(g)).collect()
    });
    for sum in &mut inputs.log2_sum {
        if generator.below(20) == 0 {
            *sum = f32::NEG_INFINITY;
        }
    }
}

/// A step with a random choice of everything.
fn random_inputs(generator: &mut Generator) -> GradientInputs {
    let dims = [1, 2, 5, 8, 16, 33, 40, 64, 80, 128];
    let (d, dv) = (dims[generator.below(dims.len())], dims[generator.below(dims.len())]);
    let most_rows = [8, 30, 140][generator.below(3)];
    let (rows, count) = (1 + generator.below(most_rows), 1 + generator.below(KEY_TILE));
    let count = if generator.below(3) == 0 { KEY_TILE } else { count };
    let mut inputs = plain_inputs(generator, (rows, count), (d, dv));
    hide(&mut inputs, generator);
    inputs.shift = sometimes(generator, 3, |g| 4.0 * g.normal() as f32).unwrap_or(0.0);
    inputs.log_weight = sometimes(generator, 2, |g| {
        let weight =
            |g: &mut Generator| if g.below(5) == 0 { f32::NEG_INFINITY } else { 3.0 * g.normal() as f32 };
        (0..count).map(|_| weight(g)).collect()
    });
    inputs.cap = sometimes(generator, 3, |g| {
        let caps = [f32::NEG_INFINITY, f32::INFINITY, -0.5, 0.25];
        (0..rows).map(|_| caps[g.below(4)]).collect()
    });
    (inputs.use_sum, inputs.use_values) =
        [(true, true), (true, true), (true, false), (false, true)][generator.below(4)];
    inputs
}

/// Whether a row and a key have anything to do with each other.
fn is_seen(inputs: &GradientInputs, row: usize, key: usize) -> bool {
    let hidden = |mask: &Vec<f32>| mask[row * inputs.key_count() + key] < -1.8e38;
    inputs.log2_sum[row] != f32::NEG_INFINITY
        && inputs.visible.as_ref().is_none_or(|visible| key < visible[row] as usize)
        && !inputs.mask.as_ref().is_some_and(hidden)
}

/// A number, and how far from it f32 may be.
#[derive(Clone, Copy, Default)]
struct Bounded {
    value: f64,
    error: f64,
}

/// Unit roundoff of f32.
const ROUNDING: f64 = 1.0 / (1u64 << 24) as f64;

/// The sum of the products of two rows, and of their magnitudes.
fn dot(a: &[f32], b: &[f32]) -> (f64, f64) {
    let products = || a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b));
    (products().sum(), products().map(f64::abs).sum())
}

/// Weight and gradient of the logit of a pair that sees each other. n operations, one after the other, are off by at
/// most n roundings of the sum of the magnitudes of their terms. A weight is off by the error of its exponent and by
/// the 2 ulp of 2^x, and below 2^-126 altogether.
fn pair(inputs: &GradientInputs, row: usize, key: usize) -> (Bounded, Bounded) {
    let (d, dv) = (inputs.head_dim, inputs.value_dim);
    let scale = f64::from(inputs.scale_log2);
    let (product, magnitude) = dot(&inputs.query[row * d..][..d], &inputs.keys[key * d..][..d]);
    let mask = inputs.mask.as_ref().map_or(0.0, |mask| f64::from(mask[row * inputs.key_count() + key]));
    let logit = scale * product + mask * LOG2_E;
    let log_weight = inputs.log_weight.as_ref().map_or(0.0, |weights| f64::from(weights[key]));
    let (shift, sum) = (f64::from(inputs.shift), f64::from(inputs.log2_sum[row]));
    let magnitudes = scale * magnitude + mask.abs() * LOG2_E + shift.abs() + sum.abs();
    let terms = if log_weight.is_finite() { magnitudes + log_weight.abs() } else { magnitudes };
    let exponent_error = (d + 8) as f64 * ROUNDING * terms;
    let cap = inputs.cap.as_ref().map_or(f64::INFINITY, |cap| f64::from(cap[row]));
    if logit > cap + exponent_error {
        return Default::default();
    }
    let weight = (logit + shift + log_weight - sum).min(127.0).exp2();
    let tiny = 2.0f64.powi(-126);
    let mut weight =
        Bounded { value: weight, error: weight * (exponent_error.exp2() - 1.0 + 5.0 * ROUNDING) + tiny };
    if logit > cap - exponent_error {
        weight.error += weight.value;
    }
    let mut slope = Bounded::default();
    if inputs.use_values {
        let gradient = &inputs.output_gradient[row * dv..][..dv];
        let (value, magnitude) = dot(gradient, &inputs.values[key * dv..][..dv]);
        slope = Bounded { value, error: (dv + 1) as f64 * ROUNDING * magnitude };
    }
    if inputs.use_sum {
        slope.error += ROUNDING * (slope.value.abs() + f64::from(inputs.delta[row]).abs());
        slope.value -= f64::from(inputs.delta[row]);
    }
    let factor = scale * LN_2;
    let gradient = Bounded {
        value: factor * weight.value * slope.value,
        error: factor
            * (weight.error * (slope.value.abs() + slope.error)
                + weight.value * (slope.error + 5.0 * ROUNDING * slope.value.abs()))
            + tiny * (1.0 + slope.value.abs()),
    };
    (weight, gradient)
}

/// The sums of some terms, added to a row of gradients.
struct Sums(Vec<Bounded>, f64);

impl Sums {
    /// `terms` of them at most.
    fn new(before: &[f32], terms: usize) -> Self {
        let start = |&x: &f32| Bounded { value: x.into(), error: 3.0 * ROUNDING * f64::from(x.abs()) };
        Sums(before.iter().map(start).collect(), (terms + 3) as f64 * ROUNDING)
    }

    fn add(&mut self, factor: Bounded, row: &[f32]) {
        for (sum, &x) in self.0.iter_mut().zip(row) {
            let x = f64::from(x);
            sum.value += factor.value * x;
            sum.error += x.abs() * (factor.error + (factor.value.abs() + factor.error) * self.1);
        }
    }

    fn check(&self, what: &str, actual: &[f32]) {
        assert_eq!(self.0.len(), actual.len());
        for (column, (sum, &x)) in self.0.iter().zip(actual).enumerate() {
            let error = (f64::from(x) - sum.value).abs();
            assert!(
                error <= sum.error,
                "{what}, column {column}: {x} should be {}, within {}",
                sum.value,
                sum.error
            );
        }
    }
}

/// Compares what a step has made of `before`.
fn check(inputs: &GradientInputs, before: &StepGradients, after: &StepGradients) {
    let (rows, count, d, dv) = (inputs.rows(), inputs.key_count(), inputs.head_dim, inputs.value_dim);
    let all: Vec<Vec<Option<(Bounded, Bounded)>>> = (0..rows)
        .map(|row| (0..count).map(|key| is_seen(inputs, row, key).then(|| pair(inputs, row, key))).collect())
        .collect();
    for (row, pairs) in all.iter().enumerate() {
        let mut sums = Sums::new(&before.query[row * d..][..d], count);
        for (key, pair) in pairs.iter().enumerate() {
            pair.iter().for_each(|pair| sums.add(pair.1, &inputs.keys[key * d..][..d]));
        }
        sums.check(&format!("query {row}"), &after.query[row * d..][..d]);
    }
    for key in 0..count {
        let mut keys = Sums::new(&before.keys[key * d..][..d], rows);
        let mut values = Sums::new(&before.values[key * dv..][..dv], rows);
        for (row, pairs) in all.iter().enumerate() {
            if let Some((weight, gradient)) = pairs[key] {
                keys.add(gradient, &inputs.query[row * d..][..d]);
                if inputs.use_values {
                    values.add(weight, &inputs.output_gradient[row * dv..][..dv]);
                }
            }
        }
        keys.check(&format!("key {key}"), &after.keys[key * d..][..d]);
        values.check(&format!("value {key}"), &after.values[key * dv..][..dv]);
    }
}

/// Calls `check` with every table and `cases` random steps.
fn for_each_random_step(
    seed: u64,
    cases: usize,
    check: impl Fn(&'static Kernels, &mut Generator, GradientInputs),
) {
    println!("seed {seed}");
    for_each_table(|kernels| {
        let mut generator = Generator::new(seed);
        for case in 0..cases {
            let inputs = random_inputs(&mut generator);
            println!(
                "case {case}: {} rows, {} keys of {}, values of {}",
                inputs.rows(),
                inputs.key_count(),
                inputs.head_dim,
                inputs.value_dim
            );
            check(kernels, &mut generator, inputs);
        }
    });
}

#[test]
fn steps_agree_with_f64() {
    for_each_random_step(310, 160, |kernels, generator, inputs| {
        let before = StepGradients {
            query: normals(generator, inputs.query.len()),
            keys: normals(generator, inputs.keys.len()),
            values: normals(generator, inputs.values.len()),
        };
        let mut after = before.clone();
        inputs.add_to(kernels, &mut after);
        check(&inputs, &before, &after);
    });
}

/// A whole tile of keys, no options, all numbers of rows and keys around those of a register tile and of a block.
#[test]
fn plain_steps_agree_with_f64() {
    let seed = 311;
    println!("seed {seed}");
    for_each_table(|kernels| {
        let mut generator = Generator::new(seed);
        for rows in (1..=20).chain(90..=120).chain([192, 256]) {
            let inputs = plain_inputs(&mut generator, (rows, KEY_TILE), (64, 64));
            check(&inputs, &StepGradients::zero(&inputs), &inputs.gradients(kernels));
        }
        for count in 1..=KEY_TILE {
            let inputs = plain_inputs(&mut generator, (7, count), (24, 40));
            check(&inputs, &StepGradients::zero(&inputs), &inputs.gradients(kernels));
        }
    });
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|x| x.to_bits()).collect()
}

/// The bits of all gradients.
fn all_bits(gradients: &StepGradients) -> [Vec<u32>; 3] {
    [bits(&gradients.query), bits(&gradients.keys), bits(&gradients.values)]
}

#[test]
fn a_row_s_bits_are_its_own_and_a_key_s_too() {
    for_each_random_step(312, 60, |kernels, generator, inputs| {
        let d = inputs.head_dim;
        let all = inputs.gradients(kernels);
        assert_eq!(all_bits(&all), all_bits(&inputs.gradients(kernels)));
        for row in 0..inputs.rows() {
            let alone = inputs.row(row).gradients(kernels);
            assert_eq!(bits(&alone.query), bits(&all.query[row * d..][..d]), "row {row}");
        }
        let count = 1 + generator.below(inputs.key_count());
        let fewer = inputs.leading_keys(count).gradients(kernels);
        assert_eq!(bits(&fewer.keys), bits(&all.keys[..count * d]));
        assert_eq!(bits(&fewer.values), bits(&all.values[..count * inputs.value_dim]));
    });
}

/// NaN and infinities reach the rows and the keys that see each other; all others keep the bits that they have where
/// the same step holds only numbers.
#[test]
fn what_is_not_finite_stays_with_those_who_see_it() {
    for_each_random_step(313, 200, |kernels, generator, mut inputs| {
        let (rows, count, d, dv) = (inputs.rows(), inputs.key_count(), inputs.head_dim, inputs.value_dim);
        inputs.cap = None;
        inputs.log_weight = None;
        let finite = inputs.gradients(kernels);
        let bad = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][generator.below(3)];
        let (row, key) = (generator.below(rows), generator.below(count));
        let what = generator.below(5);
        match what {
            0 => inputs.query[row * d + generator.below(d)] = bad,
            1 => inputs.output_gradient[row * dv + generator.below(dv)] = bad,
            2 => inputs.keys[key * d + generator.below(d)] = bad,
            3 => inputs.values[key * dv + generator.below(dv)] = bad,
            _ => inputs.delta[row] = bad,
        }
        let gradients = inputs.gradients(kernels);
        let of_row = matches!(what, 0 | 1 | 4);
        for r in 0..rows {
            let touched = if of_row { r == row } else { is_seen(&inputs, r, key) };
            if !touched {
                let range = r * d..(r + 1) * d;
                assert_eq!(
                    bits(&gradients.query[range.clone()]),
                    bits(&finite.query[range]),
                    "{what}: row {r}"
                );
            }
        }
        for j in 0..count {
            let touched = if of_row { is_seen(&inputs, row, j) } else { j == key };
            if !touched {
                let (of_key, of_value) = (j * d..(j + 1) * d, j * dv..(j + 1) * dv);
                assert_eq!(bits(&gradients.keys[of_key.clone()]), bits(&finite.keys[of_key]), "{what}: {j}");
                assert_eq!(
                    bits(&gradients.values[of_value.clone()]),
                    bits(&finite.values[of_value]),
                    "{what}: {j}"
                );
            }
        }
        if bad.is_nan() && what == 0 {
            for j in (0..count).filter(|&j| is_seen(&inputs, row, j)) {
                assert!(gradients.keys[j * d..][..d].iter().all(|x| x.is_nan()), "key {j}");
                assert!(gradients.query[row * d..][..d].iter().all(|x| x.is_nan()));
            }
        }
        if bad.is_nan() && what == 2 {
            for r in (0..rows).filter(|&r| is_seen(&inputs, r, key)) {
                assert!(gradients.query[r * d..][..d].iter().all(|x| x.is_nan()), "row {r}");
                assert!(gradients.keys[key * d..][..d].iter().all(|x| x.is_nan()));
            }
        }
    });
}

/// One row and one key, with a logit of 0, no gradient of the row's sum, and a value of 1.
fn one_pair(log2_sum: f32, output_gradient: f32) -> GradientInputs {
    GradientInputs {
        scale_log2: 1.0,
        query: vec![0.0],
        output_gradient: vec![output_gradient],
        values: vec![1.0],
        log2_sum: vec![log2_sum],
        delta: vec![0.0],
        ..plain_inputs(&mut Generator::new(0), (1, 1), (1, 1))
    }
}

#[test]
fn weights_are_at_most_2_to_the_127() {
    for_each_table(|kernels: &Kernels| {
        for log2_sum in [-127.0, -128.0, -300.0, f32::MIN] {
            let gradients = one_pair(log2_sum, 0.125).gradients(kernels);
            assert_eq!(gradients.values, [2.0f32.powi(124)], "{log2_sum}");
        }
        assert_eq!(one_pair(f32::NEG_INFINITY, f32::NAN).gradients(kernels).values, [0.0]);
        assert!(one_pair(f32::NAN, 1.0).gradients(kernels).values[0].is_nan());
    });
}

#[test]
fn a_logit_at_its_cap_counts_and_one_above_does_not() {
    for_each_table(|kernels| {
        let mut inputs = one_pair(0.0, 1.0);
        for (cap, expected) in [(0.0, 1.0), (f32::INFINITY, 1.0), (-1e-30, 0.0), (f32::NEG_INFINITY, 0.0)] {
            inputs.cap = Some(vec![cap]);
            inputs.shift = 0.0;
            assert_eq!(inputs.gradients(kernels).values, [expected], "{cap}");
            // Neither the shift nor the key's weight is in the logit that the cap bounds.
            inputs.shift = 2.0;
            assert_eq!(inputs.gradients(kernels).values, [4.0 * expected], "{cap}");
        }
    });
}
