//! Calls with everything drawn at random, against the oracle.

use hyperattn_conformance::compare::{F32_TOLERANCE, check_setup};
use hyperattn_conformance::random_mask::OwnedMask;
use hyperattn_conformance::random_problem::{RandomProblem, pick};
use hyperattn_conformance::run::Setup;
use hyperattn_conformance::storage::Arrangement;
use hyperattn_reference::Generator;

const CASES: u64 = 300;
const FIRST_SEED: u64 = 1400;

fn run(seed: u64) {
    let generator = &mut Generator::new(seed);
    let RandomProblem { params, inputs, block_mask } = RandomProblem::draw(generator, seed, 400.0, 64.0);
    let arrangements = [0; 4].map(|_| {
        let regular = [Arrangement::TokensFirst, Arrangement::Padded, Arrangement::Reversed];
        pick(generator, &regular)
    });
    let block_mask = block_mask.as_ref().map(OwnedMask::view);
    check_setup(&params, &inputs, F32_TOLERANCE, |setup| Setup { block_mask, arrangements, ..setup });
}

#[test]
fn random_problems_agree_with_the_oracle() {
    (FIRST_SEED..FIRST_SEED + CASES).for_each(run);
}
