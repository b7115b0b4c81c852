//! The error tensor: 0 for exact heads, and for the others what an estimate from exact rows can say.

use hyperattn_conformance::compare::frobenius_of;
use hyperattn_conformance::expected::oracle_mask;
