//! Records that differ in one thing only, as curves.

use std::collections::BTreeSet;

use hyperattn_core::Method;

use crate::csv::Record;
use crate::problem::Problem;
use crate::statistics::log_log_slope;

/// One curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Series {
    /// What tells it from the others.
    pub label: String,
    /// Ascending in x, with at least two different x.
    pub points: Vec<(f64, f64)>,
}

/// Curves over the same axes.
#[derive(Clone, Debug, PartialEq)]
pub struct Family {
    /// What all curves have in common, or all to whose method it matters.
    pub common: String,
    /// May be empty.
    pub series: Vec<Series>,
}

/// Settings whose values say what they are.
const PLAIN: [&str; 8] = ["implementation", "isa", "method", "pass", "mask", "dtypes", "layout", "residual"];

/// Settings that another's value says, too.
const SAID: [&str; 5] = ["dtype_k", "dtype_v", "dtype_out", "heads_kv", "n_k"];

/// Time in milliseconds over the number of keys.
pub fn time_over_length(records: &[Record]) -> Family {
    family(records, &["n"], |record| Some((record.problem.shape.n_k as f64, record.time_ms.median)))
}

/// Relative error over the keys that a query meets, where the estimator ran.
pub fn error_over_budget(records: &[Record]) -> Family {
    family(records, &["min_seq_len", "block_size", "sample_size", "budget"], |record| {
        let estimated = record.problem.params.method != Method::Exact;
        let error = record.accuracy.map(|accuracy| accuracy.error).filter(|&error| error > 0.0)?;
        (estimated && error.is_finite()).then_some((record.keys_per_query, error))
    })
}

/// The records of each combination of element types, in the order of their first.
pub fn by_dtypes(records: &[Record]) -> Vec<(String, Vec<Record>)> {
    let mut groups: Vec<(String, Vec<Record>)> = Vec::new();
    for record in records {
        let dtypes = record.problem.dtypes();
        match groups.iter_mut().find(|(other, _)| *other == dtypes) {
            Some((_, group)) => group.push(record.clone()),
            None => groups.push((dtypes, vec![record.clone()])),
        }
    }
    groups
}

impl Series {
    /// The exponent of the power that fits the curve best.
    pub fn slope(&self) -> f64 {
        log_log_slope(&self.points).unwrap_or(f64::NAN)
    }
}

/// The name and value of everything that tells two series apart.
fn identity(record: &Record, ignored: &[&str]) -> Vec<(&'static str, String)> {
    let problem = &record.problem;
    let mut identity = vec![("implementation", record.implementation.clone()), ("isa", record.isa.clone())];
    identity.extend(Problem::SETTINGS.iter().map(|&name| match name {
        "dtype_q" => ("dtypes", problem.dtypes()),
        "heads_q" => ("heads", problem.heads()),
        "n_q" => ("n", problem.lengths()),
        _ => (name, problem.get(name)),
    }));
    identity.retain(|(name, _)| !ignored.contains(name) && !SAID.contains(name) && problem.looks_at(name));
    identity
}

fn family(records: &[Record], ignored: &[&str], point: impl Fn(&Record) -> Option<(f64, f64)>) -> Family {
    type Pair = (&'static str, String);
    type Curve = (Vec<Pair>, Vec<(f64, f64)>);
    let mut curves: Vec<Curve> = Vec::new();
    for record in records {
        let Some(point) = point(record) else { continue };
        let identity = identity(record, ignored);
        match curves.iter_mut().find(|(other, _)| *other == identity) {
            Some((_, points)) => points.push(point),
            None => curves.push((identity, vec![point])),
        }
    }
    curves.retain(|(_, points)| points.iter().any(|point| point.0 != points[0].0));
    for (_, points) in &mut curves {
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
    }

    let agrees = |(name, value): &Pair, (other, its): &Pair| name != other || value == its;
    let everywhere =
        |pair: &Pair| curves.iter().all(|(identity, _)| identity.iter().all(|other| agrees(pair, other)));
    let mut pairs: Vec<Pair> = Vec::new();
    for pair in curves.iter().flat_map(|(identity, _)| identity) {
        if !pairs.contains(pair) {
            pairs.push(pair.clone());
        }
    }
    let words = |identity: &[Pair], common: bool| {
        let chosen = identity.iter().filter(|pair| everywhere(pair) == common && !pair.1.is_empty());
        let word = |(name, value): &Pair| {
            if PLAIN.contains(name) { value.clone() } else { format!("{name}={value}") }
        };
        chosen.map(word).collect::<Vec<_>>().join(" ")
    };
    Family {
        common: words(&pairs, true),
        series: curves
            .iter()
            .map(|(identity, points)| Series { label: words(identity, false), points: points.clone() })
            .collect(),
    }
}

/// The different x of all curves, ascending.
pub fn places(series: &[Series]) -> Vec<f64> {
    // Positive floats are ordered as their bits.
    let all = series.iter().flat_map(|series| &series.points).map(|point| point.0.to_bits());
    all.collect::<BTreeSet<u64>>().into_iter().map(f64::from_bits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csv::tests::record;

    #[test]
    fn a_series_is_what_differs_in_length_only() {
        let mut records = Vec::new();
        for (n, factor) in [("2k", 4.0), ("1k", 1.0), ("4k", 16.0)] {
            records.push(record(&[("n", n)], factor));
            records.push(record(&[("n", n), ("mask", "causal"), ("dtype", "bf16")], 2.0 * factor.sqrt()));
        }
        records.push(record(&[("n", "1k"), ("threads", "2")], 9.0));
        records.push(record(&[("n", "2k"), ("pass", "backward")], 30.0));
        let family = time_over_length(&records);
        let labels: Vec<&str> = family.series.iter().map(|series| series.label.as_str()).collect();
        assert_eq!(labels, ["none f32", "causal bf16"]);
        assert_eq!(family.series[0].points, [(1024.0, 1.0), (2048.0, 4.0), (4096.0, 16.0)]);
        assert!((family.series[0].slope() - 2.0).abs() < 1e-12);
        assert!((family.series[1].slope() - 1.0).abs() < 1e-12);
        assert!(family.common.contains("hyperattn avx2 exact"), "{}", family.common);
        assert!(family.common.contains("threads=1"), "{}", family.common);
        assert_eq!(places(&family.series), [1024.0, 2048.0, 4096.0]);
    }

    #[test]
    fn budgets_are_compared_where_the_estimator_ran() {
        let mut records = vec![record(&[], 1.0)];
        for (size, keys) in [("64", 128.0), ("128", 256.0)] {
            let mut estimated =
                record(&[("method", "paper"), ("block_size", size), ("sample_size", size)], 1.0);
            estimated.keys_per_query = keys;
            records.push(estimated);
        }
        let family = error_over_budget(&records);
        assert_eq!(family.series.len(), 1);
        assert_eq!(family.series[0].points, [(128.0, 3.2e-7), (256.0, 3.2e-7)]);
    }

    #[test]
    fn budgets_of_refined_are_one_curve_for_each_target() {
        let mut records = Vec::new();
        for target in ["0", "0.1"] {
            for budget in ["128", "256"] {
                let settings = [("method", "refined"), ("budget", budget), ("target_error", target)];
                let mut estimated = record(&settings, 1.0);
                estimated.keys_per_query = budget.parse().unwrap();
                records.push(estimated);
            }
        }
        let family = error_over_budget(&records);
        let labels: Vec<&str> = family.series.iter().map(|series| series.label.as_str()).collect();
        assert_eq!(labels, ["target_error=0", "target_error=0.1"]);
        assert!(family.common.contains("refined") && !family.common.contains("block_size"));
    }

    #[test]
    fn a_setting_of_one_value_is_said_once_though_some_curves_lack_it() {
        let lengths =
            ["1k", "2k"].map(|n| [record(&[("n", n)], 1.0), record(&[("n", n), ("method", "paper")], 1.0)]);
        let family = time_over_length(&lengths.concat());
        let labels: Vec<&str> = family.series.iter().map(|series| series.label.as_str()).collect();
        assert_eq!(labels, ["exact", "paper"]);
        assert!(family.common.contains("block_size=256"), "{}", family.common);
    }

    #[test]
    fn exact_series_do_not_depend_on_the_estimator_s_settings() {
        let records = [record(&[("n", "1k")], 1.0), record(&[("n", "2k"), ("min_seq_len", "7")], 1.0)];
        assert_eq!(time_over_length(&records).series.len(), 1);
    }
}
