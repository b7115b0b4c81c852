//! Which table is chosen.

use hyperattn_conformance::for_each_table;
use hyperattn_core::{Isa, Kernels};

#[test]
fn the_strongest_available_table_is_chosen() {
    let detected = Kernels::detect(None);
    println!("detected {}", detected.isa().name());
    assert!(Kernels::available().all(|kernels| kernels.isa() <= detected.isa()));
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
