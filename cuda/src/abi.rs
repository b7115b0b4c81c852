//! Mirrors of the structs in kernels/hyperattn/types.cuh, work.cuh and backward_work.cuh, field by field. The compiler of this crate's tests
//! and of the device code check the same offsets: see the test below and kernels/entry.cu.

use hyperattn_core::DType;

use crate::workspace::Pointer;

/// Queries of a tile, at most.
pub(crate) const TILE_ROWS: usize = 128;

/// A query sees positions below its causal limit only.
pub(crate) const SEGMENT_LIMITED: u32 = 4;

/// What ElementType of types.cuh calls a type.
pub(crate) fn element_type(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 1,
        DType::F16 => 2,
        DType::BF16 => 3,
    }
}

/// A tensor `[batch, heads, rows, dim]` of the device whose last dimension is contiguous. Strides are bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    pub(crate) data: u64,
    pub(crate) batch_stride: i64,
    pub(crate) head_stride: i64,
    pub(crate) row_stride: i64,
}

impl View {
    /// No tensor.
    pub(crate) const NULL: Self = View { data: 0, batch_stride: 0, head_stride: 0, row_stride: 0 };
}

/// A run of keys that all queries of a tile meet. Written by the device.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Segment {
    pub(crate) first: u32,
    pub(crate) count: u32,
    pub(crate) flags: u32,
    pub(crate) log_weight: f32,
    pub(crate) hidden_start: u32,
    pub(crate) hidden_end: u32,
}

/// Queries that meet the same keys, of one head. Written by the device.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile {
    pub(crate) batch: u32,
    pub(crate) head: u32,
    pub(crate) first_query: u32,
    pub(crate) rows: u32,
    pub(crate) flags: u32,
    pub(crate) first_segment: u32,
    pub(crate) segments: u32,
    pub(crate) first_output: u32,
}

/// What an attention kernel executes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct AttendParams {
    pub(crate) q: View,
    pub(crate) k: View,
    pub(crate) v: View,
    pub(crate) out: View,
    pub(crate) lse: View,
    pub(crate) q_type: u32,
    pub(crate) kv_type: u32,
    pub(crate) out_type: u32,
    pub(crate) heads_q: u32,
    pub(crate) group: u32,
    pub(crate) n_q: u32,
    pub(crate) n_k: u32,
    pub(crate) head_dim: u32,
    pub(crate) value_dim: u32,
    pub(crate) visible: i32,
    pub(crate) scale_log2: f32,
    pub(crate) tile_count: u32,
    pub(crate) tiles: Pointer<Tile>,
    pub(crate) segments: Pointer<Segment>,
    pub(crate) positions: Pointer<u32>,
    pub(crate) query_order: Pointer<u32>,
    pub(crate) key_order: Pointer<u32>,
    pub(crate) listed_rows: Pointer<u32>,
    pub(crate) extra_keys: Pointer<u8>,
    pub(crate) extra_values: Pointer<u8>,
    pub(crate) state_max: Pointer<f32>,
    pub(crate) state_sum: Pointer<f32>,
    pub(crate) state_accumulated: Pointer<f32>,
    pub(crate) partial_values: Pointer<u8>,
    pub(crate) partial_lse: Pointer<f32>,
    pub(crate) next_tile: Pointer<u32>,
    pub(crate) order_heads: u32,
    pub(crate) partial_rows: u32,
}

/// What every pair of a query's row needs of it. Written by the device.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowTerms {
    pub(crate) lse: f32,
    pub(crate) delta: f32,
}

/// Keys that meet the same queries, of one KV head. Written by the device.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyTile {
    pub(crate) batch: u32,
    pub(crate) kv_head: u32,
    pub(crate) first_key: u32,
    pub(crate) rows: u32,
    pub(crate) flags: u32,
    pub(crate) first_member: u32,
    pub(crate) members: u32,
    pub(crate) first_segment: u32,
    pub(crate) segments: u32,
    pub(crate) member_stride: u32,
    pub(crate) first_output: u32,
    pub(crate) turn: u32,
}

/// What a backward kernel executes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct BackwardParams {
    pub(crate) attend: AttendParams,
    pub(crate) dout: View,
    pub(crate) dk: View,
    pub(crate) dv: View,
    pub(crate) row_terms: Pointer<RowTerms>,
    pub(crate) key_tiles: Pointer<KeyTile>,
    pub(crate) query_segments: Pointer<Segment>,
    pub(crate) hidden: Pointer<u32>,
    pub(crate) key_sums: Pointer<u8>,
    pub(crate) value_sums: Pointer<u8>,
    pub(crate) key_partials: Pointer<f32>,
    pub(crate) value_partials: Pointer<f32>,
    pub(crate) key_stored: Pointer<u32>,
    pub(crate) dout_type: u32,
    pub(crate) dk_type: u32,
    pub(crate) dv_type: u32,
    pub(crate) key_tile_count: u32,
    pub(crate) scale: f32,
    pub(crate) key_sums_type: u32,
}

// What entry.cu states too.
const _: () = assert!(size_of::<RowTerms>() == 8 && size_of::<KeyTile>() == 48);
const _: () = assert!(size_of::<BackwardParams>() == 520);
const _: () = assert!(size_of::<View>() == 32 && size_of::<Segment>() == 24 && size_of::<Tile>() == 32);
const _: () = assert!(size_of::<AttendParams>() == 328);

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt::Write;
    use std::mem::offset_of;
    use std::path::Path;
    use std::process::Command;

    /// Writes an assertion for every field of a struct: its offset here is its offset there.
    macro_rules! asserts {
        ($text:expr, $type:ident { $($field:ident),+ }) => {
            writeln!($text, "static_assert(sizeof({0}) == {1}, \"{0}\");", stringify!($type), size_of::<$type>())
                .expect("a string grows");
            $(
                writeln!(
                    $text,
                    "static_assert(__builtin_offsetof({0}, {1}) == {2}, \"{0}.{1}\");",
                    stringify!($type), stringify!($field), offset_of!($type, $field)
                )
                .expect("a string grows");
            )+
            // A field that the list has not: this does not compile.
            #[allow(dead_code, unused_variables)]
            fn whole($type { $($field),+ }: $type) {}
        };
    }

    fn statements() -> String {
        let mut text = String::new();
        {
            asserts!(text, View { data, batch_stride, head_stride, row_stride });
        }
        {
            asserts!(text, Segment { first, count, flags, log_weight, hidden_start, hidden_end });
        }
        {
            asserts!(
                text,
                Tile { batch, head, first_query, rows, flags, first_segment, segments, first_output }
            );
        }
        {
            asserts!(
                text,
                AttendParams {
                    q,
                    k,
                    v,
                    out,
                    lse,
                    q_type,
                    kv_type,
                    out_type,
                    heads_q,
                    group,
                    n_q,
                    n_k,
                    head_dim,
                    value_dim,
                    visible,
                    scale_log2,
                    tile_count,
                    tiles,
                    segments,
                    positions,
                    query_order,
                    key_order,
                    listed_rows,
                    extra_keys,
                    extra_values,
                    state_max,
                    state_sum,
                    state_accumulated,
                    partial_values,
                    partial_lse,
                    next_tile,
                    order_heads,
                    partial_rows
                }
            );
        }
        {
            asserts!(text, RowTerms { lse, delta });
        }
        {
            asserts!(
                text,
                KeyTile {
                    batch,
                    kv_head,
                    first_key,
                    rows,
                    flags,
                    first_member,
                    members,
                    first_segment,
                    segments,
                    member_stride,
                    first_output,
                    turn
                }
            );
        }
        {
            asserts!(
                text,
                BackwardParams {
                    attend,
                    dout,
                    dk,
                    dv,
                    row_terms,
                    key_tiles,
                    query_segments,
                    hidden,
                    key_sums,
                    value_sums,
                    key_partials,
                    value_partials,
                    key_stored,
                    dout_type,
                    dk_type,
                    dv_type,
                    key_tile_count,
                    scale,
                    key_sums_type
                }
            );
        }
        writeln!(text, "static_assert(TILE_ROWS == {TILE_ROWS}, \"TILE_ROWS\");").expect("a string grows");
        writeln!(text, "static_assert(SEGMENT_LIMITED == {SEGMENT_LIMITED}, \"SEGMENT_LIMITED\");")
            .expect("a string grows");
        for (name, dtype) in [("F32", DType::F32), ("F16", DType::F16), ("BF16", DType::BF16)] {
            writeln!(text, "static_assert({name} == {}, \"{name}\");", element_type(dtype))
                .expect("a string grows");
        }
        text
    }

    /// The machine's C++ compiler reads the device's headers as plain C++ and checks this crate's offsets.
    #[test]
    fn the_device_s_structs_are_laid_out_alike() {
        let headers = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/hyperattn");
        if !headers.exists() {
            println!("SKIPPED: the sources are not here");
            return;
        }
        let source = std::env::temp_dir().join(format!("hyperattn_abi_{}.cpp", std::process::id()));
        let text = format!(
            "#define __device__\n#define __forceinline__ inline\n#include \"backward_work.cuh\"\nusing namespace hyperattn;\n{}",
            statements()
        );
        std::fs::write(&source, text).expect("the build's folder is writable");
        let compiler = std::env::var_os("CXX").unwrap_or_else(|| "c++".into());
        let arguments = ["-std=c++17", "-fsyntax-only", "-Wno-pragma-once-outside-header", "-I"];
        match Command::new(&compiler).args(arguments).arg(&headers).arg(&source).output() {
            Ok(output) => {
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
            Err(error) => println!("SKIPPED: {compiler:?}: {error}"),
        }
    }
}
