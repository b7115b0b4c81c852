//! Representatives: a few queries that stand for a tile when keys are weighed.
//!
//! The queries of a tile are divided among the runs of neighbours that they belong to and the few that are farthest
//! from all others so far; each part is represented by its mean. A mean of neighbours alone would hide the one query
//! among them that looks elsewhere.

use core::ops::Range;

use crate::problem::Problem;
use crate::scratch::Carver;
use crate::simd::{Packing, WEIGHING_QUERIES};
use crate::tile::Call;
use crate::tiling::TILE_ROWS;

/// Runs of neighbouring queries.
const RUNS: usize = 4;

/// Means of parts of the queries of a tile.
pub(crate) struct Representatives<'a> {
    /// `[WEIGHING_QUERIES][head_dim]`, rounded to what packing makes of them.
    means: &'a mut [f32],
    /// Queries that each stands for.
    pub(crate) counts: [f32; WEIGHING_QUERIES],
    /// How many there are.
    pub(crate) len: usize,
    /// `[W][WEIGHING_QUERIES]`, see [`crate::simd::Weighing`]; what is beyond the last repeats it.
    pub(crate) packed: &'a mut [u32],
    queries: &'a mut [f32],
    distances: &'a mut [f32],
    from_center: &'a mut [f32],
    parts: &'a mut [u32],
}

/// The part of a query that is not finite.
const NO_PART: u32 = u32::MAX;

impl<'a> Representatives<'a> {
    pub(crate) fn carve(problem: &Problem, carver: &mut Carver<'a>) -> Self {
        Representatives {
            means: carver.take(WEIGHING_QUERIES * problem.head_dim),
            counts: [0.0; WEIGHING_QUERIES],
            len: 0,
            packed: carver.take(WEIGHING_QUERIES * problem.head_dim),
            queries: carver.take(TILE_ROWS * problem.head_dim),
            distances: carver.take(TILE_ROWS),
            from_center: carver.take(TILE_ROWS),
            parts: carver.take(TILE_ROWS),
        }
    }

    /// The means, one after the other.
    pub(crate) fn means(&self) -> &[f32] {
        let head_dim = self.means.len() / WEIGHING_QUERIES;
        &self.means[..self.len * head_dim]
    }

    /// Squared distances of the queries `rows` of `head` from the means of the runs that they belong to; 0 for queries
    /// that are not finite.
    pub(crate) fn distances(
        &mut self,
        call: &Call<'_>,
        (batch, head): (usize, usize),
        rows: &Range<usize>,
    ) -> &[f32] {
        let (head_dim, count) = (call.problem.head_dim, rows.len());
        let queries = &mut self.queries[..count * head_dim];
        for (row, query) in rows.clone().zip(queries.chunks_exact_mut(head_dim)) {
            call.tensors.q.read_row(call.kernels, batch, head, row, query);
        }
        let queries = &*queries;
        let (parts, distances) = (&mut self.parts[..count], &mut self.distances[..count]);
        for (row, (part, query)) in parts.iter_mut().zip(queries.chunks_exact(head_dim)).enumerate() {
            *part = if is_finite(query) { (row * RUNS / count) as u32 } else { NO_PART };
        }
        average(queries, parts, self.means, &mut self.counts);
        for (run, mean) in self.means.chunks_exact(head_dim).take(RUNS).enumerate() {
            let rows = (run * count).div_ceil(RUNS)..((run + 1) * count).div_ceil(RUNS);
            let queries = &queries[rows.start * head_dim..rows.end * head_dim];
            call.kernels.squared_distances(queries, mean, &mut distances[rows]);
        }
        for (distance, &part) in distances.iter_mut().zip(&*parts) {
            if part == NO_PART {
                *distance = 0.0;
            }
        }
        distances
    }

    /// Represents the queries `rows` of `head`. Queries that are not finite are passed over; there may be none left.
    pub(crate) fn find(&mut self, call: &Call<'_>, place: (usize, usize), rows: &Range<usize>) {
        self.distances(call, place, rows);
        let (head_dim, count) = (call.problem.head_dim, rows.len());
        let queries = &self.queries[..count * head_dim];
        let (parts, distances) = (&mut self.parts[..count], &mut self.distances[..count]);
        for part in RUNS..WEIGHING_QUERIES {
            let mut farthest = 0;
            for (row, &distance) in distances.iter().enumerate() {
                if distance > distances[farthest] {
                    farthest = row;
                }
            }
            if distances[farthest] == 0.0 {
                break;
            }
            let center = &queries[farthest * head_dim..][..head_dim];
            let from_center = &mut self.from_center[..count];
            call.kernels.squared_distances(queries, center, from_center);
            for ((&mut from_center, part_of), distance) in
                from_center.iter_mut().zip(&mut *parts).zip(&mut *distances)
            {
                if *part_of != NO_PART && from_center < *distance {
                    (*part_of, *distance) = (part as u32, from_center);
                }
            }
        }
        average(queries, parts, self.means, &mut self.counts);
        self.len = 0;
        for part in 0..WEIGHING_QUERIES {
            if self.counts[part] > 0.0 {
                self.counts[self.len] = self.counts[part];
                self.means.copy_within(part * head_dim..(part + 1) * head_dim, self.len * head_dim);
                self.len += 1;
            }
        }
        self.pack(call);
    }

    fn pack(&mut self, call: &Call<'_>) {
        let head_dim = call.problem.head_dim;
        let means = &mut self.means[..self.len * head_dim];
        means.iter_mut().for_each(|x| *x = rounded(call, *x));
        let Some(last) = self.len.checked_sub(1) else { return };
        let scale = if call.shape.packing == Packing::F32 { call.problem.scale_log2 } else { 1.0 };
        // Slots beyond the last repeat it: a query of zeros would make a NaN of a key that nobody may weigh.
        for slot in 0..WEIGHING_QUERIES {
            let mean = &means[slot.min(last) * head_dim..][..head_dim];
            for (word, elements) in mean.chunks(call.shape.packing.depth()).enumerate() {
                self.packed[word * WEIGHING_QUERIES + slot] = match call.shape.packing {
                    Packing::F32 => (elements[0] * scale).to_bits(),
                    Packing::Bf16Pairs => {
                        crate::pack::bf16_pair(elements[0], elements.get(1).copied().unwrap_or(0.0))
                    }
                };
            }
        }
    }
}

/// The number that packing makes of `x`.
pub(crate) fn rounded(call: &Call<'_>, x: f32) -> f32 {
    match call.shape.packing {
        Packing::F32 => x,
        Packing::Bf16Pairs => half::bf16::from_f32(x).to_f32(),
    }
}

/// Means of the queries of each part, 0 for a part without any.
fn average(queries: &[f32], parts: &[u32], means: &mut [f32], counts: &mut [f32; WEIGHING_QUERIES]) {
    let head_dim = means.len() / WEIGHING_QUERIES;
    means.fill(0.0);
    counts.fill(0.0);
    for (query, &part) in queries.chunks_exact(head_dim).zip(parts) {
        if part != NO_PART {
            counts[part as usize] += 1.0;
            let mean = &mut means[part as usize * head_dim..][..head_dim];
            mean.iter_mut().zip(query).for_each(|(sum, x)| *sum += x);
        }
    }
    for (mean, count) in means.chunks_exact_mut(head_dim).zip(counts) {
        let factor = if *count > 0.0 { 1.0 / *count } else { 0.0 };
        mean.iter_mut().for_each(|x| *x *= factor);
    }
}

/// Sums of that many lanes are independent chains, in an order that no compiler may change.
const LANES: usize = 8;

/// Whether every element is finite: their products with 0 are 0 for these alone.
pub(crate) fn is_finite(row: &[f32]) -> bool {
    let mut sums = [0.0; LANES];
    let chunks = row.chunks_exact(LANES);
    let rest: f32 = chunks.remainder().iter().map(|x| x * 0.0).sum();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x * 0.0);
    }
    sums.iter().sum::<f32>() + rest == 0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finiteness() {
        let a: [f32; 11] = core::array::from_fn(|i| i as f32);
        assert!(is_finite(&a));
        for at in [0, 7, 8, 10] {
            for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut row = a;
                row[at] = x;
                assert!(!is_finite(&row));
            }
        }
    }
}
