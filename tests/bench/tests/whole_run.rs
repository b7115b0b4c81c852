//! A small list from its text to the record and the pictures.

use std::time::Duration;

use hyperattn_bench::csv::{self, Record};
use hyperattn_bench::device::Device;
use hyperattn_bench::group::{Place, measure};
use hyperattn_bench::plot::{self, Kind};
use hyperattn_bench::problem::Pass;
use hyperattn_bench::{problem_list, series};
use hyperattn_core::Kernels;

const LIST: &str = "
method=exact n=256,512 heads=2
method=exact mask=causal n=256 heads_q=4 heads_kv=2 head_dim=80 layout=bshd batch=2
method=exact dtype=bf16 n=256
method=exact dtype=f16 n=256 threads=2
versus threads=1
method=paper n=1k min_seq_len=256 block_size=64 sample_size=64
versus method=exact
method=paper mask=causal n=1k min_seq_len=256 block_size=128 sample_size=64
method=auto n=128
method=exact pass=backward mask=causal n=256 heads_q=4 heads_kv=2 head_dim=80 layout=bshd batch=2
versus pass=forward
method=exact pass=backward dtype=bf16 n=256
method=paper pass=backward n=1k min_seq_len=256 block_size=64 sample_size=64 threads=2
";

/// Exact attention in f32 stays within 5e-6 of f64 (hyperattn-conformance derives it); an output of
/// 16 bits is off by its own rounding, at most half an ulp: 2^-9 for bf16 and 2^-12 for f16. Kernels that
/// round the weights to bf16 as well are allowed as much again. A gradient with respect to queries is as close: what
/// the rounded output adds to it is a multiple of the mean key, and small.
fn tolerance(dtype: &str) -> f64 {
    match dtype {
        "f32" => 5e-6,
        "f16" => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    }
}

fn run(list: &str, kernels: &'static Kernels) -> Vec<Record> {
    let groups = problem_list::parse("list", list).expect("the list is legal");
    let (device, mut records) = (Device::Cpu(kernels), Vec::new());
    for (index, group) in groups.iter().enumerate() {
        let place = Place { list: "list", group: index + 1 };
        let measured = measure(place, group, &device, Duration::from_millis(50), &mut [])
            .expect("the problems are legal");
        assert!(measured.without.is_empty());
        records.extend(measured.records);
    }
    records
}

fn check(record: &Record) {
    let what = record.problem.label();
    let isa = &record.isa;
    let accuracy = record.accuracy.expect("every problem is compared");
    let fraction = record.peak.as_ref().expect("measured on the processor").fraction;
    println!("{isa} {what}: {fraction:.2} of the peak, error {:.1e}", accuracy.error);
    let rows = record.problem.shape.batch * record.problem.shape.heads_q * record.problem.shape.n_q;
    assert_eq!(accuracy.rows, rows, "{what}: small problems are compared on all rows");
    if record.problem.get("method") != "paper" {
        let most = tolerance(&record.problem.dtypes());
        assert!(accuracy.error < most, "{isa} {what}: error {:e}", accuracy.error);
    } else {
        // About n / 128 standard normal values that the estimator weighs wrongly: no better than this.
        assert!(accuracy.error > 1e-3 && accuracy.error.is_finite(), "{isa} {what}: {:e}", accuracy.error);
        assert!(record.keys_per_query < 400.0, "{what}: {}", record.keys_per_query);
    }
    if record.problem.pass == Pass::Backward {
        assert_eq!(record.estimated_error, None, "{isa} {what}: the estimate is that of an output");
    }
    assert!(fraction > 0.0, "{isa} {what}");
    assert!(fraction <= 1.05, "{isa} {what}: {fraction}");
    assert!(record.runs >= 3 && record.time_ms.low <= record.time_ms.median, "{what}");
    assert!(record.memory.workspace_bytes.is_some_and(|bytes| bytes > 0), "{what}");
}

#[test]
fn a_list_becomes_a_record_and_pictures() {
    let mut all = Vec::new();
    for kernels in Kernels::available() {
        let records = run(LIST, kernels);
        assert_eq!(records.len(), 14);
        records.iter().for_each(check);
        let [paper, exact] = &records[6..8] else { panic!("14 records") };
        assert_eq!(paper.ratio.median, 1.0, "the first of a group is the base");
        assert_eq!((paper.group, exact.group), (6, 6));
        let [gradients, output] = &records[10..12] else { panic!("14 records") };
        let rate = |record: &Record| record.gflops * record.time_ms.median;
        assert!((rate(gradients) / rate(output) - 2.5).abs() < 1e-9, "five products against two");
        assert_eq!(gradients.keys_per_query, output.keys_per_query);
        let workspace = |record: &Record| record.memory.workspace_bytes;
        assert!(workspace(gradients) > workspace(output), "sums of gradients need room of their own");
        // 1,024 keys a query against 128.
        assert!(exact.ratio.median > 1.0, "{}: exact took {} of paper", paper.isa, exact.ratio.median);
        all.extend(records);
    }

    let lines: Vec<String> = all.iter().map(Record::to_line).collect();
    let read =
        csv::parse(&format!("{}\n{}\n", csv::header(), lines.join("\n"))).expect("it was just written");
    assert_eq!(read.iter().map(Record::to_line).collect::<Vec<_>>(), lines);

    let family = series::time_over_length(&read);
    assert!(!family.series.is_empty(), "256 and 512 are a curve");
    let path = std::env::temp_dir().join(format!("hyperattn-bench-{}-whole.svg", std::process::id()));
    plot::draw(Kind::Time, "list: time", &family, &path).expect("the picture is drawn");
    assert!(std::fs::read_to_string(&path).expect("it was written").contains("slope"));
    std::fs::remove_file(&path).expect("it can be removed");
}

/// The same inputs estimated, computed exactly, and estimated with a target that only exact attention reaches.
const REFINED: &str = "
method=exact n=2k head_dim=16 heads=2
versus method=refined min_seq_len=256 budget=128 target_error=0
versus method=refined min_seq_len=256 budget=128 target_error=0.001
versus method=auto min_seq_len=256 budget=128 target_error=0
versus method=paper min_seq_len=256 block_size=64 sample_size=64
";

#[test]
fn the_record_says_what_the_library_says_of_its_own_call() {
    let records = run(REFINED, Kernels::detect(None));
    let [exact, refined, raised, auto, paper] = &records[..] else { panic!("five records") };
    for record in &records {
        let error = record.accuracy.map(|accuracy| accuracy.error);
        let keys = record.keys_per_query;
        println!("{}: {keys} keys, error {error:?}, {:?}", record.problem.label(), record.estimated_error);
    }
    assert_eq!((exact.keys_per_query, exact.estimated_error), (2048.0, None));
    // The budget is that of the call, and no head's was raised.
    assert_eq!((refined.keys_per_query, paper.keys_per_query), (128.0, 128.0));
    for estimated in [refined, paper] {
        let (error, own) = (estimated.accuracy.expect("compared").error, estimated.estimated_error);
        let ratio = own.expect("asked for") / error;
        // From some hundred probe rows, the same in every run.
        assert!((1.0 / 1.5..1.5).contains(&ratio), "{}: {own:?} for {error}", estimated.problem.label());
        assert!(error > 0.05, "{error}");
    }
    // What was met, not what was asked for: all heads end up exact.
    assert_eq!((raised.keys_per_query, raised.estimated_error), (2048.0, Some(0.0)));
    assert!(raised.accuracy.expect("compared").error < tolerance("f32"));
    // AUTO takes REFINED where queries see many budgets.
    assert_eq!(
        (auto.keys_per_query, auto.estimated_error, auto.accuracy),
        (refined.keys_per_query, refined.estimated_error, refined.accuracy)
    );
}

#[test]
fn what_the_library_refuses_is_an_error_with_its_sentence() {
    let groups = problem_list::parse("list", "head_dim=512 n=8").expect("the list is legal");
    let place = Place { list: "list", group: 1 };
    let device = Device::Cpu(Kernels::scalar());
    let result = measure(place, &groups[0], &device, Duration::from_millis(1), &mut []);
    let error = result.err().expect("no kernel takes so long a head").to_string();
    assert!(error.contains("head_dim"), "{error}");
}
