//! Every kernel table against the oracle, stage by stage
