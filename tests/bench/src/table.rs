//! Records as a table for reading.

use crate::csv::Record;
use crate::cuda::IMPLEMENTATION;
use crate::problem::Problem;
use crate::series::{Family, Series};

/// A width of the first column in which every problem has room.
pub fn width<'p>(problems: impl Iterator<Item = &'p Problem>) -> usize {
    problems.map(|problem| problem.label().len()).max().unwrap_or(0)
}

/// What rates are counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// 10^9 operations per second.
    Giga,
    /// 10^12 operations per second.
    Tera,
}

impl Unit {
    /// The one that gives these records readable numbers.
    pub fn of(records: &[Record]) -> Self {
        if records.iter().any(|record| record.implementation == IMPLEMENTATION) {
            Unit::Tera
        } else {
            Unit::Giga
        }
    }

    fn name(self) -> &'static str {
        match self {
            Unit::Giga => "GFLOP/s",
            Unit::Tera => "TFLOP/s",
        }
    }

    fn per_giga(self) -> f64 {
        match self {
            Unit::Giga => 1.0,
            Unit::Tera => 1e-3,
        }
    }
}

/// The names of the columns.
pub fn header(width: usize, unit: Unit) -> String {
    format!(
        "{:<width$} {:<24} {:>4} {:>10} {:>6} {:>8} {:>5} {:>7} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7}",
        "problem",
        "by",
        "runs",
        "time ms",
        "spread",
        unit.name(),
        "peak",
        "ratio",
        "keys/q",
        "estimate",
        "error",
        "work MB",
        "added MB",
        "waiting"
    )
}

/// One record.
pub fn row(record: &Record, width: usize, unit: Unit) -> String {
    let by = if record.isa.is_empty() { &record.implementation } else { &record.isa };
    let megabytes =
        |bytes: Option<u64>| bytes.map_or("-".into(), |bytes| format!("{:.1}", bytes as f64 * 1e-6));
    let exponential = |error: Option<f64>| error.map_or("-".into(), |error| format!("{error:.1e}"));
    let percent = |fraction: f64| format!("{:.0}%", 100.0 * fraction);
    format!(
        "{:<width$} {by:<24} {:>4} {:>10} {:>6} {:>8.1} {:>5} {:>7} {:>8.1} {:>8} {:>8} {:>8} {:>8} {:>7}",
        record.problem.label(),
        record.runs,
        three_digits(record.time_ms.median),
        percent(record.time_ms.spread()),
        record.gflops * unit.per_giga(),
        record.peak.as_ref().map_or("-".into(), |peak| percent(peak.fraction)),
        three_digits(record.ratio.median),
        record.keys_per_query,
        exponential(record.estimated_error),
        exponential(record.accuracy.map(|accuracy| accuracy.error)),
        megabytes(record.memory.workspace_bytes),
        megabytes(record.memory.added_bytes),
        record.waiting.map_or("-".into(), percent)
    )
}

/// The slope of every curve of time over n.
pub fn slopes(family: &Family) -> Vec<String> {
    let line = |series: &Series| {
        let [Some(first), Some(last)] = [series.points.first(), series.points.last()] else {
            return String::new();
        };
        let (label, slope) = (&series.label, series.slope());
        format!("time grows as n^{slope:.3} from n = {} to {}: {} {label}", first.0, last.0, family.common)
    };
    family.series.iter().map(line).collect()
}

/// At least three digits, without an exponent.
fn three_digits(x: f64) -> String {
    let decimals = (2.0 - x.abs().max(1e-9).log10().floor()).clamp(0.0, 9.0) as usize;
    format!("{x:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csv::tests::record;
    use crate::series::time_over_length;

    #[test]
    fn rows_fit_below_the_header() {
        let settings = [("method", "paper"), ("n", "128k"), ("min_seq_len", "1k"), ("heads", "8")];
        let record = record(&settings, 905.3);
        let width = width([&record.problem, &Problem::default()].into_iter());
        let row = row(&record, width, Unit::Giga);
        assert_eq!(row.len(), header(width, Unit::Giga).len());
        for text in [
            "paper none f32 n131072 d64 h8 t1 min_seq_len=1024",
            "avx2",
            "905",
            "82%",
            "1.00",
            "2.5e-7",
            "3.2e-7",
            "512.0",
        ] {
            assert!(row.contains(text), "{text} is not in {row}");
        }
    }

    #[test]
    fn rates_of_a_gpu_are_counted_in_tera() {
        let mut record = record(&[("dtype", "bf16"), ("n", "16k"), ("heads", "32")], 7.2);
        assert_eq!(Unit::of(&[record.clone()]), Unit::Giga);
        (record.implementation, record.isa) = (IMPLEMENTATION.into(), "sm_90".into());
        (record.gflops, record.peak, record.waiting) = (610_800.0, None, None);
        let unit = Unit::of(&[record.clone()]);
        assert!(header(40, unit).contains("TFLOP/s"));
        let row = row(&record, 40, unit);
        assert_eq!(row.len(), header(40, unit).len());
        assert!(row.contains("   610.8     - "), "{row}");
    }

    #[test]
    fn slopes_name_their_range() {
        let records = [record(&[("n", "1k")], 1.0), record(&[("n", "4k")], 16.0)];
        let lines = slopes(&time_over_length(&records));
        assert_eq!(lines.len(), 1);
        assert!(lines[0].starts_with("time grows as n^2.000 from n = 1024 to 4096: hyperattn avx2 exact"));
    }

    #[test]
    fn numbers_have_three_digits() {
        let cases =
            [(0.012_345, "0.0123"), (1.0, "1.00"), (12.345, "12.3"), (987.6, "988"), (123_456.7, "123457")];
        for (x, text) in cases {
            assert_eq!(three_digits(x), text);
        }
    }
}
