//! Which table is chosen.

use hyperattn_conformance::for_each_table;
use hyperattn_core::simd::Packing;
use hyperattn_core::{DType, Isa, Kernels};

/// Tables with bf16 products are left out: where those are slow, another is chosen.
#[test]
fn the_strongest_available_table_is_chosen() {
    let detected = Kernels::detect(None);
    println!("detected {}", detected.isa().name());
    for_each_table(|kernels| {
        let is_candidate = kernels.packing(DType::BF16) == Packing::F32;
        assert!(!is_candidate || kernels.isa() <= detected.isa(), "{kernels:?} is stronger");
    });
    assert!(Kernels::available().any(|kernels| kernels.isa() == detected.isa()));
}

#[test]
fn a_limit_holds_the_choice_down() {
    for_each_table(|kernels| assert_eq!(Kernels::detect(Some(kernels.isa())).isa(), kernels.isa()));
}

#[test]
fn a_name_leads_back_to_its_instruction_set() {
    for_each_table(|kernels| assert_eq!(Isa::from_name(kernels.isa().name()), Some(kernels.isa())));
    assert_eq!(Isa::from_name("none of them"), None);
}
