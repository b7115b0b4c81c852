//! The record of a run: one line of comma-separated values per problem and library.

use std::fmt::Display;
use std::str::FromStr;

use crate::accuracy::Accuracy;
use crate::problem::Problem;
use crate::statistics::Summary;

/// What the library's memory looked like; absent where the system does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The workspace that the call asks for.
    pub workspace_bytes: Option<u64>,
    /// The process's largest resident size during the first call, inputs included.
    pub peak_bytes: Option<u64>,
    /// How much of it the call added.
    pub added_bytes: Option<u64>,
}

/// The peak beside a problem.
#[derive(Clone, Debug, PartialEq)]
pub struct OfPeak {
    /// The instruction.
    pub name: String,
    /// Its rate on as many threads.
    pub gflops: f64,
    /// Rate of the operations that were computed, over the peak.
    pub fraction: f64,
}

/// One measured problem. `README.md` describes the columns.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    /// Name of the list.
    pub list: String,
    /// Line of the list.
    pub line: usize,
    /// Problems with the same number ran in turns; the first is the base of the ratios.
    pub group: usize,
    /// Who computed, with the version where it is not this library.
    pub implementation: String,
    /// The kernel table, or the architecture of the GPU; empty for other libraries.
    pub isa: String,
    /// What was computed.
    pub problem: Problem,
    /// Timed calls.
    pub runs: usize,
    /// Time of a call.
    pub time_ms: Summary,
    /// Exact attention's operations over the median time.
    pub gflops: f64,
    /// The machine's own; absent where it is not measured.
    pub peak: Option<OfPeak>,
    /// Time over the time of the group's first problem.
    pub ratio: Summary,
    /// Keys and columns that a query meets.
    pub keys_per_query: f64,
    /// The library's own estimate of the relative error of a head's output; absent where it was not asked for.
    pub estimated_error: Option<f64>,
    /// Against the oracle.
    pub accuracy: Option<Accuracy>,
    /// Memory of the call.
    pub memory: Memory,
    /// Share of the time that its threads waited for a core; absent where the system does not say.
    pub waiting: Option<f64>,
}

const PLACE: [&str; 5] = ["list", "line", "group", "implementation", "isa"];
const MEASURES: [&str; 19] = [
    "runs",
    "time_ms",
    "time_low_ms",
    "time_high_ms",
    "gflops",
    "peak",
    "peak_gflops",
    "fraction_of_peak",
    "ratio",
    "ratio_low",
    "ratio_high",
    "keys_per_query",
    "estimated_error",
    "error",
    "error_rows",
    "workspace_bytes",
    "peak_bytes",
    "added_bytes",
    "waiting",
];

/// Columns that older records lack.
const LATER: [&str; 7] =
    ["pass", "inputs", "budget", "num_first_keys", "band", "target_error", "estimated_error"];

fn columns() -> impl Iterator<Item = &'static str> {
    PLACE.into_iter().chain(Problem::SETTINGS).chain(MEASURES)
}

/// The names of the columns.
pub fn header() -> String {
    columns().collect::<Vec<_>>().join(",")
}

impl Record {
    /// The record as a line without its end.
    pub fn to_line(&self) -> String {
        let Record { time_ms, ratio, accuracy, memory, .. } = self;
        let mut fields = vec![
            self.list.clone(),
            self.line.to_string(),
            self.group.to_string(),
            self.implementation.clone(),
            self.isa.clone(),
        ];
        fields.extend(Problem::SETTINGS.iter().map(|name| self.problem.get(name)));
        fields.push(self.runs.to_string());
        fields.extend([time_ms.median, time_ms.low, time_ms.high, self.gflops].map(digits));
        fields.extend(self.peak.as_ref().map_or_else(Default::default, |peak| {
            [peak.name.clone(), digits(peak.gflops), digits(peak.fraction)]
        }));
        fields.extend([ratio.median, ratio.low, ratio.high, self.keys_per_query].map(digits));
        fields.push(self.estimated_error.map_or_else(String::new, digits));
        fields.push(accuracy.map_or_else(String::new, |accuracy| digits(accuracy.error)));
        fields.push(optional(accuracy.map(|accuracy| accuracy.rows)));
        fields.extend([memory.workspace_bytes, memory.peak_bytes, memory.added_bytes].map(optional));
        fields.push(self.waiting.map_or_else(String::new, digits));
        // A comma in a name would move all that follows.
        let plain: Vec<String> = fields.into_iter().map(|field| field.replace(',', ";")).collect();
        plain.join(",")
    }

    /// The record in `line`, whose fields have these names.
    fn from_line(names: &[&str], line: &str) -> Result<Self, String> {
        let fields: Vec<&str> = line.split(',').collect();
        if fields.len() != names.len() {
            return Err(format!("expected {} fields, found {}", names.len(), fields.len()));
        }
        let field = |name: &str| names.iter().position(|other| *other == name).map(|at| fields[at]);
        let mut problem = Problem::default();
        for name in Problem::SETTINGS {
            let Some(value) = field(name) else { continue };
            problem.set(name, value).map_err(|message| format!("{name} = \"{value}\": {message}"))?;
        }
        let text = |name: &str| field(name).unwrap_or_default();
        let float = |name: &str| number::<f64>(name, text(name));
        let bytes = |name: &str| maybe(name, text(name));
        let error = maybe("error", text("error"))?;
        let rows = maybe("error_rows", text("error_rows"))?;
        let rate = |name: &str| maybe::<f64>(name, text(name));
        let peak = rate("peak_gflops")?.zip(rate("fraction_of_peak")?);
        Ok(Record {
            list: text("list").to_string(),
            line: number("line", text("line"))?,
            group: number("group", text("group"))?,
            implementation: text("implementation").to_string(),
            isa: text("isa").to_string(),
            problem,
            runs: number("runs", text("runs"))?,
            time_ms: Summary {
                median: float("time_ms")?,
                low: float("time_low_ms")?,
                high: float("time_high_ms")?,
            },
            gflops: float("gflops")?,
            peak: peak.map(|(gflops, fraction)| OfPeak { name: text("peak").to_string(), gflops, fraction }),
            ratio: Summary { median: float("ratio")?, low: float("ratio_low")?, high: float("ratio_high")? },
            keys_per_query: float("keys_per_query")?,
            estimated_error: maybe("estimated_error", text("estimated_error"))?,
            accuracy: error.zip(rows).map(|(error, rows)| Accuracy { error, rows }),
            memory: Memory {
                workspace_bytes: bytes("workspace_bytes")?,
                peak_bytes: bytes("peak_bytes")?,
                added_bytes: bytes("added_bytes")?,
            },
            waiting: maybe("waiting", text("waiting"))?,
        })
    }
}

/// All records of a file.
///
/// # Errors
/// A sentence that names the line and the column.
pub fn parse(text: &str) -> Result<Vec<Record>, String> {
    let mut lines = text.lines();
    let names: Vec<&str> = lines.next().unwrap_or_default().split(',').collect();
    if let Some(name) = names.iter().find(|name| !columns().any(|column| column == **name)) {
        return Err(format!("line 1: unknown column \"{name}\""));
    }
    if let Some(column) = columns().find(|column| !names.contains(column) && !LATER.contains(column)) {
        return Err(format!("line 1: the column {column} is missing"));
    }
    let parsed = (2..).zip(lines).map(|(line, content)| {
        Record::from_line(&names, content).map_err(|message| format!("line {line}: {message}"))
    });
    parsed.collect()
}

/// Five significant digits: more than any time of a computer has.
fn digits(x: f64) -> String {
    let short: f64 = format!("{x:.4e}").parse().expect("a float as it was just written");
    // Small numbers by exponent.
    if short != 0.0 && short.abs() < 1e-3 { format!("{short:e}") } else { short.to_string() }
}

fn optional(value: Option<impl Display>) -> String {
    value.map_or_else(String::new, |value| value.to_string())
}

fn number<T: FromStr>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{name} is not a number: \"{text}\""))
}

fn maybe<T: FromStr>(name: &str, text: &str) -> Result<Option<T>, String> {
    if text.is_empty() { Ok(None) } else { number(name, text).map(Some) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A record of exact attention with these values and the defaults.
    pub(crate) fn record(settings: &[(&str, &str)], time_ms: f64) -> Record {
        let mut problem = Problem::default();
        for (name, value) in settings {
            problem.set(name, value).unwrap();
        }
        Record {
            list: "list".into(),
            line: 3,
            group: 2,
            implementation: "hyperattn".into(),
            isa: "avx2".into(),
            problem,
            runs: 7,
            time_ms: Summary { median: time_ms, low: 0.5 * time_ms, high: 2.0 * time_ms },
            gflops: 123.45,
            peak: Some(OfPeak { name: "f32 fma avx2".into(), gflops: 150.0, fraction: 0.823 }),
            ratio: Summary { median: 1.0, low: 0.99, high: 1.01 },
            keys_per_query: 512.0,
            estimated_error: Some(2.5e-7),
            accuracy: Some(Accuracy { error: 3.2e-7, rows: 64 }),
            memory: Memory {
                workspace_bytes: Some(1 << 20),
                peak_bytes: Some(1 << 30),
                added_bytes: Some(0),
            },
            waiting: Some(0.125),
        }
    }

    #[test]
    fn records_survive_writing_and_reading() {
        let mut bare = record(&[("method", "auto"), ("dtype_k", "f16"), ("n", "1m")], 12340.0);
        (bare.accuracy, bare.memory, bare.waiting) = (None, Memory::default(), None);
        (bare.estimated_error, bare.peak) = (None, None);
        bare.isa = String::new();
        let mut infinite = record(&[("residual", "row_norm")], 2e-5);
        infinite.accuracy = Some(Accuracy { error: f64::INFINITY, rows: 1 });
        let refined = record(&[("method", "refined"), ("budget", "512"), ("target_error", "0.125")], 3.0);
        let gradients = record(&[("pass", "backward")], 0.75);
        let records = [record(&[], 0.25), bare, infinite, refined, gradients];
        let mut text = header();
        for record in &records {
            text += &format!("\n{}", record.to_line());
        }
        assert_eq!(parse(&text).unwrap(), records);
    }

    #[test]
    fn five_digits_are_kept() {
        assert_eq!(digits(1_234_567.0), "1234600");
        assert_eq!(digits(0.123_456_7), "0.12346");
        assert_eq!(digits(3.2e-7), "3.2e-7");
        assert_eq!(digits(0.0), "0");
    }

    #[test]
    fn errors_name_the_line_and_the_column() {
        let good = record(&[], 1.0).to_line();
        let with = |line: &str| parse(&format!("{}\n{good}\n{line}", header())).unwrap_err();
        assert_eq!(with("a,b"), "line 3: expected 48 fields, found 2");
        assert_eq!(with(&good.replace("123.45", "fast")), "line 3: gflops is not a number: \"fast\"");
        assert!(with(&good.replace("exact", "fast")).starts_with("line 3: method = \"fast\": the value"));
        assert_eq!(parse("list,speed\n").unwrap_err(), "line 1: unknown column \"speed\"");
        let without_time = header().replace("time_ms,", "");
        assert_eq!(parse(&without_time).unwrap_err(), "line 1: the column time_ms is missing");
        assert!(parse("").is_err());
    }

    #[test]
    fn older_records_lack_the_later_columns() {
        let expected = Record { estimated_error: None, ..record(&[("method", "paper"), ("n", "4k")], 5.0) };
        let names = header();
        let line = expected.to_line();
        let older: Vec<(&str, &str)> =
            names.split(',').zip(line.split(',')).filter(|(name, _)| !LATER.contains(name)).collect();
        assert_eq!(older.len(), 41);
        let row = |part: fn(&(&str, &str)) -> String| older.iter().map(part).collect::<Vec<_>>().join(",");
        let text =
            format!("{}\n{}\n", row(|(name, _)| name.to_string()), row(|(_, value)| value.to_string()));
        assert_eq!(parse(&text).unwrap(), [expected]);
    }
}
