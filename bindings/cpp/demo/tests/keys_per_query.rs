//! The demo's formula for the keys that a query meets, against counting them one query at a time.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use hyperattn_link::{Language, Program};

/// Settings of one problem.
#[derive(Clone, Copy, Debug)]
struct Settings {
    n: i64,
    causal: bool,
    block_size: i64,
    samples: i64,
    min_seq_len: i64,
}

/// Walks down the halving to the leaf that holds `query` and counts the keys met on the way.
fn columns_of_query(query: i64, s: Settings) -> i64 {
    let leaf = s.min_seq_len.max(s.block_size);
    if !s.causal {
        return if s.n <= leaf { s.n } else { s.block_size + s.samples };
    }
    let (mut low, mut high, mut met) = (0, s.n, 0);
    while high - low > leaf {
        let middle = low + (high - low + 1) / 2;
        if query < middle {
            high = middle;
            continue;
        }
        let keys = middle - low;
        met += if keys <= s.block_size { keys } else { s.block_size + s.samples };
        low = middle;
    }
    met + (low..high).filter(|&key| key <= query).count() as i64
}

fn by_counting(s: Settings) -> f64 {
    (0..s.n).map(|query| columns_of_query(query, s)).sum::<i64>() as f64 / s.n as f64
}

fn by_formula(problems: &[Settings]) -> Vec<f64> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let object = Program::new(Language::C99, [here.join("keys_per_query.c")])
        .compile_only(&folder.join("keys_per_query.o"))
        .expect("the formula compiles");
    let program = Program::new(Language::C99, [here.join("tests/keys_per_query_main.c")])
        .include(here)
        .archive(object)
        .compile(&folder.join("keys_per_query"))
        .expect("the test program links without the library");
    let mut child = Command::new(program)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut input = child.stdin.take().expect("standard input is a pipe");
    for s in problems {
        writeln!(input, "{} {} {} {} {}", s.n, i32::from(s.causal), s.block_size, s.samples, s.min_seq_len)
            .expect("the program reads");
    }
    drop(input);
    let output = child.wait_with_output().expect("the program ends");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).expect("numbers");
    text.lines().map(|line| line.parse().expect("a number")).collect()
}

#[test]
fn formula_equals_counting() {
    let mut problems = Vec::new();
    for n in [1, 2, 3, 255, 256, 257, 1000, 1023, 1025, 4096, 4097, 8191, 8192, 10007] {
        for causal in [false, true] {
            // The demo's settings, a leaf below one block, and blocks alone.
            for (block_size, samples, min_seq_len) in
                [(256, 256, 4096), (256, 512, 1024), (64, 16, 0), (100, 0, 7)]
            {
                problems.push(Settings { n, causal, block_size, samples, min_seq_len });
            }
        }
    }
    let formula = by_formula(&problems);
    assert_eq!(formula.len(), problems.len());
    for (&problem, &formula) in problems.iter().zip(&formula) {
        let counted = by_counting(problem);
        assert!(
            (formula - counted).abs() <= 1e-9 * counted,
            "{problem:?}: formula {formula}, counted {counted}"
        );
    }
}

#[test]
fn halves_of_8192_with_leaves_of_4096() {
    // By hand: both halves are exact (2048.5 on average), and the second half meets 512 keys of the first.
    let settings = Settings { n: 8192, causal: true, block_size: 256, samples: 256, min_seq_len: 4096 };
    assert_eq!(by_counting(settings), 2048.5 + 512.0 / 2.0);
}
