//! The command line.

use std::ops::RangeInclusive;

/// What the C program accepts.
const MAX_N: RangeInclusive<u32> = 4096..=1 << 20;

/// What `--help` prints.
pub const USAGE: &str = "\
Compares exact attention with HyperAttention through the C library: time, error, keys per query.

Usage: cargo demo [OPTIONS]

Options:
  --max-n N   longest generated input, 4096 to 1048576 tokens [default: 65536];
              the lengths are 4096, 8192, ... up to N
  --help      print this text

Writes target/demo/hyperattn.csv and target/demo/hyperattn.svg.
";

/// The options of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// The longest generated input.
    pub max_n: u32,
}

impl Options {
    /// `None` when the user asked for help.
    ///
    /// # Errors
    /// A sentence that names the argument.
    pub fn parse(arguments: &[String]) -> Result<Option<Self>, String> {
        let mut options = Self { max_n: 65536 };
        let mut rest = arguments.iter();
        while let Some(argument) = rest.next() {
            match argument
                .split_once('=')
                .map_or((argument.as_str(), None), |(name, value)| (name, Some(value)))
            {
                ("--help" | "-h", None) => return Ok(None),
                ("--max-n", value) => {
                    let value =
                        value.or_else(|| rest.next().map(String::as_str)).ok_or("--max-n needs a number")?;
                    options.max_n = value.parse().ok().filter(|n| MAX_N.contains(n)).ok_or_else(|| {
                        format!(
                            "--max-n takes a number from {} to {}, not \"{value}\"",
                            MAX_N.start(),
                            MAX_N.end()
                        )
                    })?;
                }
                _ => return Err(format!("unknown argument \"{argument}\"")),
            }
        }
        Ok(Some(options))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<Option<Options>, String> {
        Options::parse(&arguments.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn reads_the_length() {
        assert_eq!(parse(&[]), Ok(Some(Options { max_n: 65536 })));
        assert_eq!(parse(&["--max-n", "8192"]), Ok(Some(Options { max_n: 8192 })));
        assert_eq!(parse(&["--max-n=16384"]), Ok(Some(Options { max_n: 16384 })));
        assert_eq!(parse(&["--help"]), Ok(None));
    }

    #[test]
    fn refuses_the_rest() {
        for bad in [
            &["--max-n"][..],
            &["--max-n", "4095"],
            &["--max-n", "many"],
            &["--fast"],
            &["8192"],
            &["--help=1"],
        ] {
            assert!(parse(bad).is_err(), "{bad:?} was accepted");
        }
    }
}
