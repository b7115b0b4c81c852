//! Heads with what attention of trained models shows: a far key that many queries want, first keys that all
//! queries want, neighbours that want each other.

use hyperattn_core::DType;
use hyperattn_reference::Generator;

use crate::inputs::{Inputs, Shape};

/// One head of `n` queries and keys, head_dim and value_dim `d`.
pub fn square(n: usize, d: usize) -> Shape {
    Shape { head_dim: d, value_dim: d, ..Shape::single(n, n) }
}

/// A unit vector.
fn direction(generator: &mut Generator, dim: usize) -> Vec<f64> {
    let vector = generator.normal_matrix(1, dim);
    let norm = vector.iter().map(|x| x * x).sum::<f64>().sqrt();
    vector.into_iter().map(|x| x / norm).collect()
}

/// Adds `factor` times `direction` to `row`.
fn add(row: &mut [f32], direction: &[f64], factor: f64) {
    row.iter_mut().zip(direction).for_each(|(x, y)| *x += (factor * y) as f32);
}

/// Diffuse attention, but for the queries of the second half: key `position` of each KV head has a logit of about 14
/// for them (with the default scale), and so nearly all of their weight.
pub fn needle(shape: Shape, position: usize, seed: u64) -> Inputs {
    let mut inputs = Inputs::normal(shape, seed);
    println!("a needle at {position}");
    let mut generator = Generator::new(seed + 1);
    let d = shape.head_dim;
    let norm = (d as f64).sqrt();
    for kv_head in 0..shape.batch * shape.heads_kv {
        let wanted = direction(&mut generator, d);
        let key = &mut inputs.k[(kv_head * shape.n_k + position) * d..][..d];
        key.fill(0.0);
        add(key, &wanted, norm);
        let queries = shape.group() * shape.n_q * d;
        for (i, query) in inputs.q[kv_head * queries..][..queries].chunks_mut(d).enumerate() {
            if i % shape.n_q >= shape.n_q / 2 {
                query.iter_mut().for_each(|x| *x *= 0.3);
                add(query, &wanted, 14.0);
            }
        }
    }
    inputs
}

/// Every query weighs its neighbours within some 16 positions, and the first four keys about as much together.
pub fn sinks_and_neighbours(shape: Shape, seed: u64) -> Inputs {
    assert!(shape.n_q <= shape.n_k);
    println!("first keys and neighbours {shape:?}, seed {seed}");
    let mut generator = Generator::new(seed);
    let Shape { batch, heads_kv, n_q, n_k, head_dim, value_dim, .. } = shape;
    let norm = (head_dim as f64).sqrt();
    let (mut q, mut k) = (Vec::new(), Vec::new());
    for _ in 0..batch * heads_kv {
        let sink = direction(&mut generator, head_dim);
        // A direction that drifts: after 16 positions half of it is another.
        let mut drift = direction(&mut generator, head_dim);
        let mut places = Vec::new();
        for _ in 0..n_k {
            let step = direction(&mut generator, head_dim);
            drift.iter_mut().zip(step).for_each(|(x, y)| *x = 0.96 * *x + 0.28 * y);
            places.push(drift.clone());
        }
        for (j, place) in places.iter().enumerate() {
            let mut key = vec![0.0; head_dim];
            if j < 4 {
                add(&mut key, &sink, norm);
            } else {
                add(&mut key, place, norm);
            }
            k.extend(key);
        }
        for _ in 0..shape.group() {
            for place in &places[n_k - n_q..] {
                let mut query = normals(&mut generator, head_dim);
                query.iter_mut().for_each(|x| *x *= 0.3);
                add(&mut query, place, 12.0);
                add(&mut query, &sink, 12.0);
                q.extend(query);
            }
        }
    }
    Inputs {
        shape,
        dtypes: DType::F32.into(),
        q,
        k,
        v: normals(&mut generator, batch * heads_kv * n_k * value_dim),
    }
}

/// A text that changes its topic every 96 tokens: keys and queries of one stretch lie near one of 12 centres, to which
/// the text returns. The last query stands where the last key stands if there are fewer queries, else the first where
/// the first stands.
pub fn topics(shape: Shape, seed: u64) -> Inputs {
    println!("topics {shape:?}, seed {seed}");
    let mut generator = Generator::new(seed);
    let Shape { batch, heads_kv, n_q, n_k, head_dim, value_dim, .. } = shape;
    let rows = |generator: &mut Generator, centres: &[f64], positions: std::ops::Range<usize>| {
        let mut rows = Vec::new();
        for position in positions {
            let centre = position / 96 * 7 % 12 * head_dim;
            let near = |&x: &f64| (x + 0.4 * generator.normal()) as f32;
            rows.extend(centres[centre..][..head_dim].iter().map(near));
        }
        rows
    };
    let (mut q, mut k) = (Vec::new(), Vec::new());
    for _ in 0..batch * heads_kv {
        let centres = generator.normal_matrix(12, head_dim);
        k.extend(rows(&mut generator, &centres, 0..n_k));
        let first = n_k.saturating_sub(n_q);
        for _ in 0..shape.group() {
            q.extend(rows(&mut generator, &centres, first..first + n_q));
        }
    }
    Inputs {
        shape,
        dtypes: DType::F32.into(),
        q,
        k,
        v: normals(&mut generator, batch * heads_kv * n_k * value_dim),
    }
}

fn normals(generator: &mut Generator, count: usize) -> Vec<f32> {
    (0..count).map(|_| generator.normal() as f32).collect()
}

/// One call of inputs of one head each.
pub fn together(heads: &[Inputs]) -> Inputs {
    let shape = Shape { heads_q: heads.len(), heads_kv: heads.len(), ..heads[0].shape };
    let joined = |part: fn(&Inputs) -> &[f32]| heads.iter().flat_map(part).copied().collect();
    Inputs {
        shape,
        dtypes: heads[0].dtypes,
        q: joined(|head| &head.q),
        k: joined(|head| &head.k),
        v: joined(|head| &head.v),
    }
}

/// Hides keys from every query: their logits fall by 1.5 `by` times the scale.
pub fn hide(inputs: &mut Inputs, hidden: impl Fn(usize) -> bool, by: f32) {
    let Shape { n_k, head_dim, .. } = inputs.shape;
    inputs.q.chunks_mut(head_dim).for_each(|row| row[3] = 1.5);
    let keys = inputs.k.chunks_mut(head_dim).enumerate().filter(|(key, _)| hidden(key % n_k));
    keys.for_each(|(_, row)| row[3] = -by);
}
