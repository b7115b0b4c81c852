//! Seeded inputs for tests. Not the library's generator: no result may depend on sharing one.

/// SplitMix64. A test prints its seed; the same seed gives the same inputs.
#[derive(Clone, Debug)]
pub struct Generator {
    state: u64,
}

impl Generator {
    /// A generator that starts at `seed`.
    pub fn new(seed: u64) -> Self {
        Generator { state: seed }
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..bound, such as a sampled key; `bound` is at least 1.
    pub fn below(&mut self, bound: usize) -> usize {
        assert!(bound > 0, "nothing is below 0");
        ((self.next_u64() as u128 * bound as u128) >> 64) as usize
    }

    /// Standard normal, by the Box-Muller transform.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// A row-major matrix of independent standard normals.
    pub fn normal_matrix(&mut self, rows: usize, columns: usize) -> Vec<f64> {
        (0..rows * columns).map(|_| self.normal()).collect()
    }

    /// Rows at a normal distance `spread` around one of `clusters` standard normal centres each: inputs
    /// whose large entries a locality-sensitive hash can find.
    pub fn clustered_matrix(
        &mut self,
        rows: usize,
        columns: usize,
        clusters: usize,
        spread: f64,
    ) -> Vec<f64> {
        let centres = self.normal_matrix(clusters, columns);
        let mut matrix = Vec::with_capacity(rows * columns);
        for _ in 0..rows {
            let centre = self.below(clusters) * columns;
            matrix.extend((0..columns).map(|column| centres[centre + column] + spread * self.normal()));
        }
        matrix
    }
}
