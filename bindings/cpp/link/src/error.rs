//! The one error type: what was tried, and everything that the tool printed.

use std::fmt;
use std::io;
use std::process::{Command, Output};

/// A build step that failed.
#[derive(Clone, Debug)]
pub struct Error {
    step: String,
    output: String,
}

impl Error {
    pub(crate) fn new(step: impl Into<String>, output: impl Into<String>) -> Self {
        Self { step: step.into(), output: output.into() }
    }

    /// What was tried: a command line, or the step before it.
    pub fn step(&self) -> &str {
        &self.step
    }

    /// What the tool printed, standard output first; or why it could not be started.
    pub fn output(&self) -> &str {
        &self.output
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "failed: {}\n{}", self.step, self.output)
    }
}

impl std::error::Error for Error {}

/// Runs a command to its end; an unsuccessful one becomes an [`Error`] with all of its output.
pub(crate) fn run(command: &mut Command) -> Result<Output, Error> {
    let output =
        command.output().map_err(|e: io::Error| Error::new(format!("{command:?}"), e.to_string()))?;
    if output.status.success() {
        return Ok(output);
    }
    let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    Err(Error::new(format!("{command:?} ({})", output.status), text))
}
