//! The problem and the static buffers.

/// Query heads; all of them read the one KV head.
pub(crate) const HEADS: usize = 2;
/// Queries, and keys.
pub(crate) const LEN: usize = 160;
/// Elements of a query and of a key.
pub(crate) const HEAD_DIM: usize = 24;
/// Elements of a value.
pub(crate) const VALUE_DIM: usize = 20;
/// Seed of the inputs and of the library's generator.
pub(crate) const SEED: u64 = 20_231_005;

/// Output and log-sum-exp of one call.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    pub(crate) out: [f32; HEADS * LEN * VALUE_DIM],
    pub(crate) lse: [f32; HEADS * LEN],
}

impl Output {
    const EMPTY: Self = Output { out: [0.0; HEADS * LEN * VALUE_DIM], lse: [0.0; HEADS * LEN] };
}

#[repr(align(64))]
pub(crate) struct Workspace(pub(crate) [u8; 1 << 20]);

/// Every byte that the program works on.
pub(crate) struct Buffers {
    pub(crate) q: [f32; HEADS * LEN * HEAD_DIM],
    pub(crate) k: [f32; LEN * HEAD_DIM],
    pub(crate) v: [f32; LEN * VALUE_DIM],
    pub(crate) reference: Output,
    pub(crate) exact: Output,
    pub(crate) paper: Output,
    pub(crate) first_table: Output,
    pub(crate) workspace: Workspace,
}

static mut BUFFERS: Buffers = Buffers {
    q: [0.0; HEADS * LEN * HEAD_DIM],
    k: [0.0; LEN * HEAD_DIM],
    v: [0.0; LEN * VALUE_DIM],
    reference: Output::EMPTY,
    exact: Output::EMPTY,
    paper: Output::EMPTY,
    first_table: Output::EMPTY,
    workspace: Workspace([0; 1 << 20]),
};

/// The buffers, with q, k and v filled; the first column of v is 1.
///
/// # Safety
/// To be called once.
pub(crate) unsafe fn buffers() -> &'static mut Buffers {
    let buffers = &raw mut BUFFERS;
    // SAFETY: the program has one thread, and this is the only borrow ever made (contract).
    let buffers = unsafe { &mut *buffers };
    let mut state = SEED;
    for x in buffers.q.iter_mut().chain(&mut buffers.k).chain(&mut buffers.v) {
        *x = 2.0 * uniform(&mut state) - 1.0;
    }
    // Otherwise the logits are near 0 and the softmax hides errors in them.
    buffers.q.iter_mut().for_each(|x| *x *= 4.0);
    buffers.v.iter_mut().step_by(VALUE_DIM).for_each(|x| *x = 1.0);
    buffers
}

/// In [0, 1): the upper bits of a 64-bit linear congruential generator (Knuth's constants).
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 40) as f32 / (1 << 24) as f32
}
