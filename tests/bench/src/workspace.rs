//! The memory that a call works in, kept from call to call.

use hyperattn_core::Layout;

/// Aligned bytes.
pub struct Workspace {
    memory: Vec<u8>,
    start: usize,
}

impl Workspace {
    /// As much as a call needs.
    pub fn new(need: Layout) -> Self {
        let memory = vec![0; need.size + need.align];
        Workspace { start: memory.as_ptr().align_offset(need.align), memory }
    }

    /// At least what was asked for.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }
}
