//! `--device cuda`: what it says without a device, and on one a small list from its text to the record.

use std::fs;
use std::process::{Command, Output};

use hyperattn_bench::csv;

const LIST: &str = "
method=exact dtype=bf16 heads_q=4 heads_kv=2 n=1k head_dim=64,128
versus mask=causal
method=exact dtype=f32 n=300 layout=bshd batch=2
method=exact pass=backward dtype=bf16 heads_q=4 heads_kv=2 n=1k mask=none,causal
versus pass=forward
method=paper dtype=f16 heads=2 n=4k min_seq_len=1k
method=refined dtype=bf16 heads=2 n=4k min_seq_len=1k budget=512 target_error=0
versus method=auto
versus method=exact
";

fn bench() -> Command {
    let mut bench = Command::new(env!("CARGO_BIN_EXE_hyperattn-bench"));
    bench.args(["--device", "cuda", "--budget", "0.05"]);
    bench
}

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

#[test]
fn without_a_device_a_line_says_so() {
    // Hides the devices of a machine that has some.
    let mut bench = bench();
    bench.arg("quick").env("CUDA_VISIBLE_DEVICES", "-1");
    let skipped = bench.env_remove("HYPERATTN_REQUIRE_TOOLS").output().expect("it starts");
    assert!(skipped.status.success(), "{}", text(&skipped));
    let lines = String::from_utf8(skipped.stdout).expect("text");
    assert!(lines.starts_with("SKIPPED: CUDA: ") && lines.lines().count() == 1, "{lines}");

    let required = bench.env("HYPERATTN_REQUIRE_TOOLS", "1").output().expect("it starts");
    assert_eq!(required.status.code(), Some(1), "{}", text(&required));
    assert!(text(&required).contains("CUDA is required: "), "{}", text(&required));
}

#[test]
fn a_record_has_the_columns_of_the_processor_s() {
    let folder = std::env::temp_dir().join(format!("hyperattn-bench-{}-device", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let (list, record) = (folder.join("list.txt"), folder.join("record.csv"));
    fs::write(&list, LIST).expect("the list is written");
    let mut bench = bench();
    // Tools are required of machines that need no device.
    bench.env_remove("HYPERATTN_REQUIRE_TOOLS");
    let run = bench.arg(&list).arg("--csv").arg(&record).output().expect("it starts");
    let output = text(&run);
    if output.contains("SKIPPED: CUDA: ") {
        let required = std::env::var_os("HYPERATTN_REQUIRE_DEVICE").is_some_and(|value| value == "1");
        assert!(!required, "{output}");
        println!("{output}");
        return;
    }
    assert!(run.status.success(), "{output}");
    println!("{output}");
    let records = csv::parse(&fs::read_to_string(&record).expect("text")).expect("legal");
    assert_eq!(records.len(), 13);
    for record in &records {
        let what = record.problem.label();
        assert_eq!(record.implementation, "cuda");
        assert!(record.isa.starts_with("sm_"), "{}", record.isa);
        assert!(record.runs >= 3 && record.time_ms.median > 0.0 && record.gflops > 0.0, "{what}");
        assert_eq!((&record.peak, record.waiting, record.memory.peak_bytes), (&None, None, None));
        assert!(record.memory.workspace_bytes.is_some(), "{what}");
        let error = record.accuracy.expect("every problem is compared").error;
        if record.problem.get("method") == "exact" {
            // As on the processor, with weights of 16 bits as well. Of a gradient the output is rounded, too.
            let most = if record.problem.dtypes() == "f32" { 5e-6 } else { 2f64.powi(-7) };
            assert!(error < most, "{what}: {error:e}");
        } else {
            assert!(error.is_finite(), "{what}: {error}");
            assert!(record.estimated_error.is_some_and(f64::is_finite), "{what}");
        }
    }
    fs::remove_dir_all(&folder).expect("it can be removed");
}
