//! PyTorch's attention on the same problem, in a Python process that stays alive between calls.

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use hyperattn_core::Mask;

use crate::problem::{Problem, Shape};
use crate::timing::Member;

/// PyTorch's threads look for work this long before they sleep; meanwhile they slow others down.
const REST: Duration = Duration::from_millis(20);

/// The process that computes.
pub struct Peer {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    name: String,
}

impl Peer {
    /// PyTorch in the `python3` of the caller's PATH.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn torch() -> Result<Self, String> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/peer_torch.py");
        let mut python = Command::new("python3");
        Self::start(python.arg(script))
    }

    /// A program that speaks as `peer_torch.py` does.
    fn start(command: &mut Command) -> Result<Self, String> {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child =
            child.map_err(|error| format!("{} does not start: {error}", command.get_program().display()))?;
        let requests = child.stdin.take();
        let answers = child.stdout.take().ok_or("no standard output")?;
        let mut peer = Peer { child, requests, answers: BufReader::new(answers), name: String::new() };
        peer.name = peer.answer("ready")?;
        Ok(peer)
    }

    /// Library and version.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes inputs of this shape for the calls to come.
    ///
    /// # Errors
    /// Why this library cannot compute the problem.
    pub fn prepare(&mut self, problem: &Problem) -> Result<(), String> {
        let Shape { dtypes, n_q, n_k, .. } = problem.shape;
        if dtypes.iter().any(|&dtype| dtype != problem.dtype_out) {
            return Err("it wants one element type for q, k, v and out".to_string());
        }
        if problem.params.mask != Mask::None && n_q != n_k {
            return Err("its causal mask is another one for n_q != n_k".to_string());
        }
        let mut request = "prepare".to_string();
        for name in Problem::SETTINGS {
            request += &format!(" {name}={}", problem.get(name));
        }
        self.ask(&request, "prepared").map(|_| ())
    }

    /// Sends one line, and returns what follows `expected` in the answer.
    fn ask(&mut self, request: &str, expected: &str) -> Result<String, String> {
        let requests = self.requests.as_mut().ok_or("the process was ended")?;
        writeln!(requests, "{request}").map_err(|error| format!("the process does not read: {error}"))?;
        self.answer(expected)
    }

    fn answer(&mut self, expected: &str) -> Result<String, String> {
        let mut line = String::new();
        self.answers.read_line(&mut line).map_err(|error| format!("no answer: {error}"))?;
        let (word, rest) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
        match word {
            "error" => Err(rest.to_string()),
            "" => Err("the process ended without an answer".to_string()),
            _ if word == expected => Ok(rest.to_string()),
            _ => Err(format!("expected \"{expected}\", found \"{}\"", line.trim_end())),
        }
    }
}

impl Member for Peer {
    fn call(&mut self) -> Result<f64, Box<dyn Error>> {
        let seconds = self.ask("run", "seconds")?;
        Ok(seconds.parse().map_err(|_| format!("not a time: \"{seconds}\""))?)
    }

    fn rest(&mut self) {
        std::thread::sleep(REST);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The end of its input ends it.
        self.requests = None;
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Result<Peer, String> {
        Peer::start(Command::new("sh").args(["-c", script]))
    }

    #[test]
    fn a_peer_answers_line_by_line() {
        let echo = r#"echo ready other 1.0; while read -r word rest; do
            case $word in run) echo seconds 0.25;; *) echo prepared;; esac; done"#;
        let mut peer = shell(echo).unwrap();
        assert_eq!(peer.name(), "other 1.0");
        peer.prepare(&Problem::default()).unwrap();
        assert_eq!(peer.call().unwrap(), 0.25);
        assert_eq!(peer.call().unwrap(), 0.25);
    }

    #[test]
    fn what_goes_wrong_is_said() {
        assert_eq!(shell("echo error no module").err().unwrap(), "no module");
        assert_eq!(shell("exit 3").err().unwrap(), "the process ended without an answer");
        assert_eq!(shell("echo hello").err().unwrap(), "expected \"ready\", found \"hello\"");
        let mut peer =
            shell("echo ready x; read -r _; echo seconds soon; read -r _; echo error no memory").unwrap();
        assert_eq!(peer.call().unwrap_err().to_string(), "not a time: \"soon\"");
        assert_eq!(peer.call().unwrap_err().to_string(), "no memory");
        let missing = Peer::start(&mut Command::new("hyperattn-no-such-program")).err().unwrap();
        // Emulators of a processor tell of a failed start only by the end of the process.
        let ended = "the process ended without an answer";
        assert!(missing.contains("no-such-program does not start") || missing == ended, "{missing}");
    }

    #[test]
    fn problems_that_the_peer_reads_differently_are_not_sent() {
        let mut peer = shell("echo ready x; read -r _ && echo prepared").unwrap();
        let mut mixed = Problem::default();
        mixed.set("dtype_k", "f16").unwrap();
        assert!(peer.prepare(&mixed).unwrap_err().contains("element type"));
        let mut ragged = Problem::default();
        ragged.set("n_k", "4096").unwrap();
        ragged.set("mask", "causal").unwrap();
        assert!(peer.prepare(&ragged).unwrap_err().contains("causal"));
        assert_eq!(peer.prepare(&Problem::default()), Ok(()));
    }
}
