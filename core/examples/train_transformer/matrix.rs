//! Matrices as slices of rows.

/// `out += a b` for `a` of `[rows, inner]` and `b` of `[inner, columns]`.
pub fn add_product(out: &mut [f32], a: &[f32], b: &[f32], columns: usize) {
    let inner = b.len() / columns;
    for (out, a) in out.chunks_exact_mut(columns).zip(a.chunks_exact(inner)) {
        // Four rows of b at a time, so that out is read and written less often.
        let mut factors = a.chunks_exact(4);
        let mut rows = b.chunks_exact(4 * columns);
        for (factors, rows) in factors.by_ref().zip(rows.by_ref()) {
            let (first, rest) = rows.split_at(columns);
            let (second, rest) = rest.split_at(columns);
            let (third, fourth) = rest.split_at(columns);
            for (column, out) in out.iter_mut().enumerate() {
                *out += factors[0] * first[column]
                    + factors[1] * second[column]
                    + factors[2] * third[column]
                    + factors[3] * fourth[column];
            }
        }
        for (&factor, row) in factors.remainder().iter().zip(rows.remainder().chunks_exact(columns)) {
            out.iter_mut().zip(row).for_each(|(out, &x)| *out += factor * x);
        }
    }
}

/// The matrix with rows and columns exchanged; `columns` are those of `a`.
pub fn transposed(a: &[f32], columns: usize) -> Vec<f32> {
    let rows = a.len() / columns;
    let mut out = vec![0.0; a.len()];
    for (row, values) in a.chunks_exact(columns).enumerate() {
        values.iter().enumerate().for_each(|(column, &x)| out[column * rows + row] = x);
    }
    out
}
