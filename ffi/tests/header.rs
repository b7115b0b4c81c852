//! The header in the tree is what the pinned generator makes of the sources.
//!
//! After a change of the interface: `HYPERATTN_WRITE_HEADER=1 cargo test -p hyperattn-ffi --test header`.

use std::path::Path;

#[test]
fn the_header_in_the_tree_is_up_to_date() {
    let ffi = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = ffi.join("../include/hyperattn/hyperattn.h");
    let mut builder = cbindgen::Builder::new()
        .with_config(cbindgen::Config::from_file(ffi.join("cbindgen.toml")).expect("cbindgen.toml is valid"));
    // In the order in which a reader meets the declarations.
    for file in [
        "version",
        "types",
        "status",
        "error",
        "tensor",
        "params",
        "cpu",
        "backward",
        "plan",
        "diagnose",
        "cuda",
        "cuda_backward",
        "cuda_plan",
    ] {
        builder = builder.with_src(ffi.join("src").join(file).with_extension("rs"));
    }
    let mut generated = Vec::new();
    builder.generate().expect("the sources are understood").write(&mut generated);
    let generated = String::from_utf8(generated).expect("the header is text");
    if std::env::var_os("HYPERATTN_WRITE_HEADER").is_some() {
        std::fs::write(&path, &generated).expect("the header is written");
    }
    let stored = std::fs::read_to_string(&path).expect("include/hyperattn/hyperattn.h is there");
    assert!(
        stored == generated,
        "include/hyperattn/hyperattn.h is out of date: \
         HYPERATTN_WRITE_HEADER=1 cargo test -p hyperattn-ffi --test header"
    );
}
