//! Codes of every table against the oracle, bit by bit.

use hyperattn_conformance::expected::projections;
use hyperattn_conformance::for_each_table;
use hyperattn_core::{Kernels, Params, stages};
use hyperattn_reference::{Generator, lsh_code};

const HEAD_DIMS: [usize; 5] = [1, 3, 64, 80, 256];

/// Normal rows; rows almost orthogonal to a hyperplane, where the sign hangs on the order of summation;
/// zeros, subnormal numbers, infinities and NaN.
fn rows(head_dim: usize, normals: &[f32], generator: &mut Generator) -> Vec<f32> {
    let num_projs = normals.len() / head_dim;
    let mut rows = Vec::new();
    for index in 0..37 {
        let mut row: Vec<f32> = (0..head_dim).map(|_| generator.normal() as f32).collect();
        let special = generator.below(head_dim);
        match index {
            0 => row.fill(0.0),
            1 => row.fill(f32::MIN_POSITIVE / 8.0),
            2 => row[special] = f32::NAN,
            3 => row[special] = f32::INFINITY,
            4 => row[special] = f32::NEG_INFINITY,
            5 => row.fill(f32::NAN),
            6 => row.fill(f32::MAX),
            _ if index % 2 == 0 => {
                let normal = |i: usize| f64::from(normals[i * num_projs + index % num_projs]);
                let last = head_dim - 1;
                let rest: f64 = (0..last).map(|i| f64::from(row[i]) * normal(i)).sum();
                row[last] = (-rest / normal(last)) as f32;
            }
            _ => {}
        }
        rows.extend(row);
    }
    rows
}

/// Codes of `rows` by one table, from projections in the table's own padded layout.
fn codes(kernels: &Kernels, params: &Params, rows: &[f32], head_dim: usize) -> Vec<u32> {
    let num_projs = params.lsh_num_projs as usize;
    let width = stages::projection_width(kernels, num_projs);
    let mut projections = vec![f32::NAN; head_dim * width];
    let stream_of = (params.seed, params.offset, 0);
    stages::fill_projections(stream_of, head_dim, num_projs, width, &mut projections);
    let mut codes = vec![u32::MAX; rows.len() / head_dim];
    let words: Vec<u32> = rows.iter().map(|x| x.to_bits()).collect();
    kernels.hash(&words.chunks(head_dim).collect::<Vec<_>>(), &projections, width, &mut codes);
    codes
}

#[test]
fn codes_equal_the_oracle_s() {
    let seed = 100;
    println!("seed {seed}");
    let mut generator = Generator::new(seed);
    for head_dim in HEAD_DIMS {
        for lsh_num_projs in 1..=Params::MAX_PROJECTIONS {
            let params = Params { lsh_num_projs, seed, ..Params::default() };
            let projections = projections(&params, head_dim, 0);
            let rows = rows(head_dim, &projections, &mut generator);
            let expected: Vec<u32> = rows
                .chunks(head_dim)
                .map(|row| lsh_code(row, &projections, lsh_num_projs as usize))
                .collect();
            assert!(expected.iter().all(|code| code >> lsh_num_projs == 0));
            for_each_table(|kernels| {
                let codes = codes(kernels, &params, &rows, head_dim);
                assert_eq!(codes, expected, "head_dim {head_dim}, {lsh_num_projs} hyperplanes");
            });
        }
    }
}

/// The rows above would not tell orders of summation apart if no sign hung on them.
#[test]
fn some_signs_hang_on_the_order_of_summation() {
    let seed = 101;
    println!("seed {seed}");
    let (head_dim, num_projs) = (64, 7);
    let params = Params { lsh_num_projs: num_projs as u32, seed, ..Params::default() };
    let projections = projections(&params, head_dim, 0);
    let mut differing = 0;
    for _ in 0..20 {
        let rows = rows(head_dim, &projections, &mut Generator::new(seed + differing));
        let reversed = |row: &[f32]| row.iter().rev().copied().collect::<Vec<f32>>();
        let backwards: Vec<f32> = projections.chunks(num_projs).rev().flatten().copied().collect();
        differing += rows
            .chunks(head_dim)
            .filter(|row| {
                let forwards = lsh_code(row, &projections, num_projs);
                forwards != lsh_code(&reversed(row), &backwards, num_projs)
            })
            .count() as u64;
    }
    println!("{differing} of 740 codes depend on the order");
    assert!(differing >= 20);
}

#[test]
fn a_row_of_nan_has_code_0() {
    let head_dim = 80;
    let params = Params { lsh_num_projs: 24, ..Params::default() };
    for_each_table(|kernels| {
        assert_eq!(codes(kernels, &params, &vec![f32::NAN; 3 * head_dim], head_dim), [0; 3]);
    });
}
