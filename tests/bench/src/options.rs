//! The command line.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyperattn_core::{Isa, Kernels};

/// What `--help` prints.
pub const USAGE: &str = "\
Measures lists of problems: time, share of the machine's peak, error, memory.

Usage: cargo bench-all [OPTIONS] [LIST]...

LIST is a file, or the name of a list in tests/bench/problems
[default: short exact paper growth threads refined backward; with --device cuda: cuda]

Options:
  --device NAME     cpu or cuda, the first GPU of the machine [default: cpu]
  --isa NAME        the kernels to measure: scalar, avx2, ..., or all that the machine can run [default: the best]
  --budget SECONDS  time for the calls of each problem [default: 1]
  --peer torch      time PyTorch on the same problems, in turns
  --csv FILE        write a record of all columns
  --plot DIR        draw time against n and error against keys per query, one picture of each for a list
  --redraw FILE     measure nothing: print and draw the record in FILE
  --help            print this text
";

/// What runs when no list is named.
pub const DEFAULT_LISTS: [&str; 7] = ["short", "exact", "paper", "growth", "threads", "refined", "backward"];

/// What runs on a GPU when no list is named.
pub const DEFAULT_CUDA_LIST: &str = "cuda";

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The processor.
    Cpu,
    /// The first GPU.
    Cuda,
}

impl Target {
    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Target::Cpu => "cpu",
            Target::Cuda => "cuda",
        }
    }
}

/// The options of one run.
#[derive(Debug)]
pub struct Options {
    /// Files to read.
    pub lists: Vec<PathBuf>,
    /// What computes.
    pub target: Target,
    /// Tables to measure on the processor.
    pub tables: Vec<&'static Kernels>,
    /// Time for each problem.
    pub budget: Duration,
    /// Whether PyTorch is timed, too.
    pub torch: bool,
    /// Where the record goes.
    pub csv: Option<PathBuf>,
    /// Where the pictures go.
    pub plot: Option<PathBuf>,
    /// The record to draw instead of measuring.
    pub redraw: Option<PathBuf>,
}

impl Options {
    /// `None` when the user asked for help.
    ///
    /// # Errors
    /// A sentence that names the argument.
    pub fn parse(arguments: &[String]) -> Result<Option<Self>, String> {
        let mut options = Options {
            lists: Vec::new(),
            target: Target::Cpu,
            tables: vec![Kernels::detect(None)],
            budget: Duration::from_secs(1),
            torch: false,
            csv: None,
            plot: None,
            redraw: None,
        };
        let mut isa_is_given = false;
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            if !argument.starts_with('-') {
                options.lists.push(list_file(argument));
                continue;
            }
            if ["--help", "-h"].contains(&argument.as_str()) {
                return Ok(None);
            }
            let (name, value) = match argument.split_once('=') {
                Some((name, value)) => (name, Some(value)),
                None => (argument.as_str(), None),
            };
            let mut value =
                || value.or_else(|| rest.next().map(String::as_str)).ok_or(format!("{name} needs a value"));
            match name {
                "--device" => match value()? {
                    "cpu" => options.target = Target::Cpu,
                    "cuda" => options.target = Target::Cuda,
                    other => return Err(format!("--device takes cpu or cuda, not \"{other}\"")),
                },
                "--isa" => (options.tables, isa_is_given) = (tables(value()?)?, true),
                "--budget" => options.budget = budget(value()?)?,
                "--peer" => match value()? {
                    "torch" => options.torch = true,
                    other => return Err(format!("--peer takes torch, not \"{other}\"")),
                },
                "--csv" => options.csv = Some(value()?.into()),
                "--plot" => options.plot = Some(value()?.into()),
                "--redraw" => options.redraw = Some(value()?.into()),
                _ => return Err(format!("unknown argument \"{argument}\"")),
            }
        }
        if isa_is_given && options.target != Target::Cpu {
            return Err("--isa chooses kernels of the processor; leave it out with --device cuda".to_string());
        }
        if options.lists.is_empty() {
            options.lists = match options.target {
                Target::Cpu => DEFAULT_LISTS.iter().map(|name| list_file(name)).collect(),
                Target::Cuda => vec![list_file(DEFAULT_CUDA_LIST)],
            };
        }
        Ok(Some(options))
    }
}

/// Where the lists of this crate are: in its folder, or beside a program that was taken to another machine.
pub fn shipped_lists_folder() -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("problems");
    let program = std::env::current_exe().unwrap_or_default();
    match program.parent() {
        Some(beside) if !folder.is_dir() => beside.join("problems"),
        _ => folder,
    }
}

/// A file that exists is meant; any other name is one of this crate's lists.
fn list_file(name: &str) -> PathBuf {
    let file = PathBuf::from(name);
    if file.is_file() { file } else { shipped_lists_folder().join(format!("{name}.txt")) }
}

fn tables(name: &str) -> Result<Vec<&'static Kernels>, String> {
    if name == "all" {
        return Ok(Kernels::available().collect());
    }
    let named: Vec<_> =
        Kernels::available().filter(|kernels| Isa::from_name(name) == Some(kernels.isa())).collect();
    if named.is_empty() {
        let known: Vec<&str> = Kernels::available().map(|kernels| kernels.isa().name()).collect();
        return Err(format!(
            "--isa takes all or what this machine can run ({}), not \"{name}\"",
            known.join(", ")
        ));
    }
    Ok(named)
}

fn budget(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    let positive = seconds.filter(|seconds| !seconds.is_zero());
    positive.ok_or_else(|| format!("--budget takes a positive number of seconds, not \"{text}\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Option<Options>, String> {
        Options::parse(&arguments.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn reads_every_option() {
        let arguments = [
            "--device",
            "cpu",
            "--isa",
            "all",
            "--budget=0.5",
            "--peer",
            "torch",
            "--csv",
            "a",
            "--plot",
            "b",
            "--redraw=c",
            "quick",
        ];
        let options = parse(&arguments).unwrap().unwrap();
        assert_eq!(options.tables.len(), Kernels::available().count());
        assert_eq!(options.budget, Duration::from_millis(500));
        assert!(options.torch && options.target == Target::Cpu);
        assert_eq!(
            [options.csv, options.plot, options.redraw],
            ["a", "b", "c"].map(|name| Some(PathBuf::from(name)))
        );
        assert_eq!(options.lists, [shipped_lists_folder().join("quick.txt")]);
    }

    #[test]
    fn without_arguments_the_default_lists_run_on_the_best_table() {
        let options = parse(&[]).unwrap().unwrap();
        assert_eq!(options.lists.len(), DEFAULT_LISTS.len());
        assert!(options.lists.iter().all(|list| list.is_file()));
        assert_eq!(options.tables[0].isa(), Kernels::detect(None).isa());
        assert!(parse(&["--help"]).unwrap().is_none());
        assert_eq!(parse(&["--isa=scalar"]).unwrap().unwrap().tables[0].isa(), Isa::Scalar);
    }

    #[test]
    fn a_gpu_has_a_list_of_its_own_which_the_processor_does_not_run() {
        let options = parse(&["--device=cuda"]).unwrap().unwrap();
        assert_eq!(options.target, Target::Cuda);
        assert_eq!(options.lists, [shipped_lists_folder().join("cuda.txt")]);
        assert!(options.lists[0].is_file());
        assert!(!DEFAULT_LISTS.contains(&DEFAULT_CUDA_LIST));
        let named = parse(&["quick", "--device", "cuda"]).unwrap().unwrap();
        assert_eq!(named.lists, [shipped_lists_folder().join("quick.txt")]);
    }

    #[test]
    fn refuses_the_rest() {
        for bad in [
            &["--device", "tpu"][..],
            &["--device"],
            &["--device=cuda", "--isa=scalar"],
            &["--isa=scalar", "--device=cuda"],
            &["--isa", "best"],
            &["--isa"],
            &["--budget", "0"],
            &["--budget", "-1"],
            &["--budget", "long"],
            &["--peer", "jax"],
            &["--fast"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
