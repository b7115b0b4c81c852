//! What a tile of queries knows of its part of the mask tensor.

use core::ops::Range;

use crate::simd::{KEY_TILE, MaskSurvey};

/// What the rows of a tile see of some keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// No row sees any.
    Nothing,
    /// Every row sees all.
    Everything,
    /// Each row sees as many leading ones as the tile's memory says now.
    Leading,
    /// The mask in the tile's memory says it, from element `offset` of each row on; where it is `limited`, only as far as
    /// [`Seen::Leading`] goes.
    Masked { limited: bool, offset: usize },
}

/// Tiles of keys whose part of the mask is looked at together. The elements of a row lie together, and the next row far
/// away, as a rule at a power of two: of such lines and pages the processor keeps only a few.
pub(crate) const SURVEYED_TILES: usize = 16;

/// Elements of a row of the mask that are loaded together, for that reason too; as many as there is memory for.
pub(crate) const LOADED_KEYS: usize = 4 * KEY_TILE;

/// What a tile knows of its part of the mask.
#[derive(Debug, Clone)]
pub(crate) struct KnownMask {
    /// The keys that were looked at, tile by tile.
    pub(crate) surveyed: Range<usize>,
    pub(crate) surveys: [MaskSurvey; SURVEYED_TILES],
    /// The keys whose part is in the tile's memory.
    pub(crate) loaded: Range<usize>,
}

impl KnownMask {
    pub(crate) const NOTHING: Self =
        KnownMask { surveyed: 0..0, surveys: [MaskSurvey::OF_NOTHING; SURVEYED_TILES], loaded: 0..0 };
}
