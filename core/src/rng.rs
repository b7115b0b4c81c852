//! Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011), so that a draw depends only on
//! the seed, the offset, the head and its own index, on every machine and for every number of threads.

use crate::math;

/// Ten rounds of Philox4x32.
pub fn philox(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    let mut key = key;
    let mut c = counter;
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let product = |m: u32, x: u32| u64::from(m) * u64::from(x);
        let (p0, p1) = (product(MULTIPLIERS[0], c[0]), product(MULTIPLIERS[1], c[2]));
        c = [(p1 >> 32) as u32 ^ c[1] ^ key[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ key[1], p0 as u32];
    }
    c
}

/// What a stream of draws is for; different purposes are independent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// The hyperplanes of Algorithm 1.
    Projection = 1,
    /// Uniformly sampled keys (Algorithm 2, and the practical residual).
    UniformKey = 2,
    /// Rows whose sums bound tau in Algorithm 2.
    TauRow = 3,
    /// Keys sampled by the row norms of V in Algorithm 3.
    RowNormKey = 4,
    /// Rows that are computed exactly to estimate an error.
    ProbeRow = 5,
}

/// The draws of one purpose for one head.
#[derive(Debug, Clone, Copy)]
pub struct Stream {
    key: [u32; 2],
}

fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

fn joined(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

impl Stream {
    /// The stream of `purpose` for `head`, under the caller's seed and offset.
    pub fn new(seed: u64, offset: u64, head: usize, purpose: Purpose) -> Self {
        let [low, high] = halves(offset);
        let [a, b, _, _] = philox(halves(seed), [low, high, head as u32, purpose as u32]);
        Stream { key: [a, b] }
    }

    /// Two 64-bit numbers: block `index` of sub-stream `sub`.
    fn block(&self, sub: [u32; 2], index: usize) -> [u64; 2] {
        let [low, high] = halves(index as u64);
        let [a, b, c, d] = philox(self.key, [low, high, sub[0], sub[1]]);
        [joined(a, b), joined(c, d)]
    }

    /// Standard normal number `index` (Box-Muller, by arithmetic that rounds alike everywhere).
    pub fn normal(&self, index: usize) -> f32 {
        let [radius, angle] = self.block([0; 2], index / 2);
        let pair = math::normal_pair(radius, angle);
        pair[index % 2]
    }

    /// Draw `index` of the sub-problem whose keys start at `start` and count `len`, in `0..2^64`.
    pub fn uniform(&self, start: usize, len: usize, index: usize) -> u64 {
        self.block([start as u32, len as u32], index / 2)[index % 2]
    }
}

/// `draw` scaled to `0..bound`. Off from uniform by at most `bound / 2^64`.
pub fn below(draw: u64, bound: usize) -> usize {
    ((u128::from(draw) * bound as u128) >> 64) as usize
}

/// `draw` scaled to `[0, 1)` in steps of 2^-53.
pub fn unit(draw: u64) -> f64 {
    (draw >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the generator's authors publish with it.
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(
            philox([u32::MAX; 2], [u32::MAX; 4]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox([0xa409_3822, 0x299f_31d0], [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_are_keyed_by_seed_offset_head_and_purpose() {
        let draw = |seed, offset, head, purpose| Stream::new(seed, offset, head, purpose).uniform(0, 100, 0);
        let base = draw(1, 2, 3, Purpose::UniformKey);
        assert_eq!(base, draw(1, 2, 3, Purpose::UniformKey));
        assert_ne!(base, draw(2, 2, 3, Purpose::UniformKey));
        assert_ne!(base, draw(1, 3, 3, Purpose::UniformKey));
        assert_ne!(base, draw(1, 2 + (1 << 32), 3, Purpose::UniformKey));
        assert_ne!(base, draw(1, 2, 4, Purpose::UniformKey));
        assert_ne!(base, draw(1, 2, 3, Purpose::RowNormKey));
    }

    /// 100,000 draws; the bounds are 4.5 standard deviations (confidence above 0.99999 each).
    #[test]
    fn normals_have_the_moments_of_a_normal() {
        let seed = 7;
        let stream = Stream::new(seed, 0, 0, Purpose::Projection);
        let n = 100_000;
        let (mut m1, mut m2, mut m4) = (0.0, 0.0, 0.0);
        for i in 0..n {
            let x = f64::from(stream.normal(i));
            m1 += x;
            m2 += x * x;
            m4 += x * x * x * x;
        }
        let n = n as f64;
        let (m1, m2, m4) = (m1 / n, m2 / n, m4 / n);
        let deviations = 4.5 / libm::sqrt(n);
        assert!(m1.abs() < deviations, "seed {seed}: mean {m1}");
        assert!((m2 - 1.0).abs() < deviations * libm::sqrt(2.0), "seed {seed}: variance {m2}");
        assert!((m4 - 3.0).abs() < deviations * libm::sqrt(96.0), "seed {seed}: fourth moment {m4}");
    }

    #[test]
    fn below_stays_below() {
        assert_eq!(below(u64::MAX, 7), 6);
        assert_eq!(below(0, 7), 0);
        assert!(unit(u64::MAX) < 1.0);
    }
}
