//! The one error type: what was tried, and everything that the tool printed.

use std::fmt;
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

/// The program and its arguments, without the environment, which is long and the user's own.
pub(crate) fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}

/// Runs a command to its end; an unsuccessful one becomes an [`Error`] with all of its output.
pub(crate) fn run(command: &mut Command) -> Result<Output, Error> {
    let output = command.output().map_err(|e| Error::new(command_line(command), e.to_string()))?;
    if output.status.success() {
        return Ok(output);
    }
    let text = [&output.stdout[..], &output.stderr[..]].map(String::from_utf8_lossy).concat();
    Err(Error::new(format!("{} ({})", command_line(command), output.status), text))
}
