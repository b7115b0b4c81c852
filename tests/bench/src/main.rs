//! `cargo bench-all`: see README.md.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use hyperattn_bench::csv::{self, Record};
use hyperattn_bench::cuda::Cuda;
use hyperattn_bench::device::Device;
use hyperattn_bench::group::{Place, measure};
use hyperattn_bench::options::{Options, Target, USAGE};
use hyperattn_bench::peer::Peer;
use hyperattn_bench::plot::{self, Kind};
use hyperattn_bench::problem_list::{self, Group};
use hyperattn_bench::table::Unit;
use hyperattn_bench::{series, table};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let options = match Options::parse(&arguments) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        Err(message) => {
            eprint!("{message}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let result = if options.redraw.is_some() { redraw(&options) } else { run(&options) };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A list by name.
type List = (String, Vec<Group>);

fn run(options: &Options) -> Result<(), Box<dyn Error>> {
    let lists: Vec<List> = options.lists.iter().map(|path| read_list(path)).collect::<Result<_, _>>()?;
    let Some(devices) = devices(options)? else { return Ok(()) };
    let mut csv = match &options.csv {
        Some(path) => Some(File::create(path).map_err(|error| format!("{}: {error}", path.display()))?),
        None => None,
    };
    if let Some(csv) = &mut csv {
        writeln!(csv, "{}", csv::header())?;
    }
    let mut peers = if options.torch { start_torch(options.target)? } else { Vec::new() };
    println!("{}", machine());
    let mut unit = Unit::Giga;
    if let [Device::Cuda(cuda)] = &devices[..] {
        println!("{}", cuda.describe());
        unit = Unit::Tera;
    }

    let (mut refused, mut number) = (0, 0);
    for (name, groups) in &lists {
        let width = table::width(groups.iter().flatten().map(|entry| &entry.problem));
        println!("\n{name}\n{}", table::header(width, unit));
        let mut records: Vec<Record> = Vec::new();
        for device in &devices {
            for group in groups {
                number += 1;
                let place = Place { list: name, group: number };
                let measured = match measure(place, group, device, options.budget, &mut peers) {
                    Ok(measured) => measured,
                    Err(error) => {
                        refused += 1;
                        println!("REFUSED: {}: {error}", group[0].problem.label());
                        continue;
                    }
                };
                for record in &measured.records {
                    println!("{}", table::row(record, width, unit));
                    if let Some(csv) = &mut csv {
                        writeln!(csv, "{}", record.to_line())?;
                    }
                }
                for (peer, reason) in measured.without {
                    println!("SKIPPED: {peer} on {}: {reason}", group[0].problem.label());
                }
                records.extend(measured.records);
            }
        }
        finish_list(name, &records, options.plot.as_deref())?;
    }
    if refused > 0 {
        return Err(format!("{refused} problems were refused; the lines above say why").into());
    }
    Ok(())
}

/// Prints and draws a record that was written before.
fn redraw(options: &Options) -> Result<(), Box<dyn Error>> {
    let path = options.redraw.as_deref().unwrap_or(Path::new(""));
    let text = fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let records = csv::parse(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    for of_list in records.chunk_by(|a, b| a.list == b.list) {
        let width = table::width(of_list.iter().map(|record| &record.problem));
        let unit = Unit::of(of_list);
        println!("\n{}\n{}", of_list[0].list, table::header(width, unit));
        for record in of_list {
            println!("{}", table::row(record, width, unit));
        }
        finish_list(&of_list[0].list, of_list, options.plot.as_deref())?;
    }
    Ok(())
}

/// Curves that one picture has room for; more are drawn in one for each combination of element types.
const MOST_CURVES: usize = 8;

/// What the records of a list say together.
fn finish_list(name: &str, records: &[Record], folder: Option<&Path>) -> Result<(), Box<dyn Error>> {
    let (time, error) = (series::time_over_length(records), series::error_over_budget(records));
    for line in table::slopes(&time) {
        println!("{line}");
    }
    let Some(folder) = folder else { return Ok(()) };
    fs::create_dir_all(folder)?;
    let mut pictures = vec![(Kind::Error, "error".to_owned(), error)];
    if time.series.len() <= MOST_CURVES {
        pictures.push((Kind::Time, "time".to_owned(), time));
    } else {
        for (dtypes, records) in series::by_dtypes(records) {
            let what = format!("{}-time", dtypes.replace('/', "-"));
            pictures.push((Kind::Time, what, series::time_over_length(&records)));
        }
    }
    for (kind, what, family) in pictures {
        if !family.series.is_empty() {
            let path = folder.join(format!("{name}-{what}.svg"));
            plot::draw(kind, &format!("{name}: {what}"), &family, &path)?;
            println!("{}", path.display());
        }
    }
    Ok(())
}

fn read_list(path: &Path) -> Result<List, String> {
    let file = path.display().to_string();
    let text = fs::read_to_string(path).map_err(|error| format!("{file}: {error}"))?;
    let name = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    Ok((name, problem_list::parse(&file, &text)?))
}

/// What computes; `None` after a line that says why there is nothing.
fn devices(options: &Options) -> Result<Option<Vec<Device>>, Box<dyn Error>> {
    if options.target == Target::Cpu {
        return Ok(Some(options.tables.iter().map(|kernels| Device::Cpu(kernels)).collect()));
    }
    let reason = match Cuda::find() {
        Ok(cuda) => match cuda.load()? {
            None => return Ok(Some(vec![Device::Cuda(cuda)])),
            Some(reason) => reason,
        },
        Err(reason) => reason,
    };
    skip("CUDA", &reason)?;
    Ok(None)
}

/// PyTorch, or a line that says why not.
fn start_torch(target: Target) -> Result<Vec<Peer>, String> {
    match Peer::torch(target) {
        Ok(peers) => Ok(peers),
        Err(reason) => skip("PyTorch", &reason).map(|()| Vec::new()),
    }
}

/// Says that something is not there, which is an error where it is required.
fn skip(what: &str, reason: &str) -> Result<(), String> {
    if std::env::var_os("HYPERATTN_REQUIRE_TOOLS").is_some_and(|value| value == "1") {
        return Err(format!("{what} is required: {reason}"));
    }
    println!("SKIPPED: {what}: {reason}");
    Ok(())
}

/// The processor by its own name, and how many of its threads this process may use.
fn machine() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let name = model.map_or(std::env::consts::ARCH, |(_, name)| name.trim());
    format!("{name}, {threads} hardware threads")
}
