//! PyTorch's attention on the same problem, in a Python process that stays alive between calls. On a GPU each of
//! its back ends is a peer of its own.

use std::cell::RefCell;
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use hyperattn_core::Mask;

use crate::options::Target;
use crate::problem::{Problem, Shape};
use crate::timing::{Member, SHORT};

/// PyTorch's threads look for work this long before they sleep; meanwhile they slow others down.
const REST: Duration = Duration::from_millis(20);

/// On a GPU: as in `cuda.rs`, behind one that is not timed the timed ones are enqueued while the GPU works.
const SHORT_ON_CUDA: f64 = 20e-3;

/// What the script is asked for on each target.
fn backends(target: Target) -> &'static [&'static str] {
    match target {
        Target::Cpu => &["default"],
        Target::Cuda => &["cudnn", "flash"],
    }
}

/// The program of the process.
const SCRIPT: &str = include_str!("../peer_torch.py");

/// A back end of the process that computes.
pub struct Peer {
    process: Rc<RefCell<Process>>,
    target: Target,
    backend: &'static str,
    name: String,
}

struct Process {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    /// PyTorch in the `python3` of the caller's PATH, once for each back end.
    ///
    /// # Errors
    /// Why it cannot be had.
    pub fn torch(target: Target) -> Result<Vec<Self>, String> {
        let mut python = Command::new("python3");
        Self::start(python.args(["-c", SCRIPT, target.name()]), target)
    }

    /// A program that speaks as `peer_torch.py` does.
    fn start(command: &mut Command, target: Target) -> Result<Vec<Self>, String> {
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child =
            child.map_err(|error| format!("{} does not start: {error}", command.get_program().display()))?;
        let requests = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().ok_or("no standard output")?);
        let mut process = Process { child, requests, answers };
        let library = process.answer("ready")?;
        let process = Rc::new(RefCell::new(process));
        let peer = |&backend: &&'static str| Peer {
            process: Rc::clone(&process),
            target,
            backend,
            name: match target {
                Target::Cpu => library.clone(),
                Target::Cuda => format!("{library} {backend}"),
            },
        };
        Ok(backends(target).iter().map(peer).collect())
    }

    /// Library, version and, on a GPU, the back end.
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
        let mut request = format!("prepare backend={}", self.backend);
        for name in Problem::SETTINGS {
            request += &format!(" {name}={}", problem.get(name));
        }
        self.process.borrow_mut().ask(&request, "prepared").map(|_| ())
    }
}

impl Process {
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
        Ok(self.calls(1, false)?[0])
    }

    fn calls(&mut self, count: usize, warm_up: bool) -> Result<Vec<f64>, Box<dyn Error>> {
        let request = format!("run {} {count} {}", self.backend, u8::from(warm_up));
        let answer = self.process.borrow_mut().ask(&request, "seconds")?;
        let times: Option<Vec<f64>> = answer.split_whitespace().map(|time| time.parse().ok()).collect();
        let times = times.filter(|times| times.len() == count);
        Ok(times.ok_or_else(|| format!("not {count} times: \"{answer}\""))?)
    }

    fn rest(&mut self) {
        if self.target == Target::Cpu {
            std::thread::sleep(REST);
        }
    }

    fn short(&self) -> f64 {
        match self.target {
            Target::Cpu => SHORT,
            Target::Cuda => SHORT_ON_CUDA,
        }
    }
}

impl Drop for Process {
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
        let mut peers = Peer::start(Command::new("sh").args(["-c", script]), Target::Cpu)?;
        assert_eq!(peers.len(), 1);
        Ok(peers.remove(0))
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
    fn back_ends_of_one_process_are_peers_of_their_own() {
        let script = r#"echo ready torch 9; while read -r word backend count warm; do case "$word $backend" in
            "prepare backend=flash") echo error no kernel;; prepare*) echo prepared;;
            run*) echo seconds 1 "$count" "$warm";; esac; done"#;
        let mut peers = Peer::start(Command::new("sh").args(["-c", script]), Target::Cuda).unwrap();
        let names: Vec<&str> = peers.iter().map(Peer::name).collect();
        assert_eq!(names, ["torch 9 cudnn", "torch 9 flash"]);
        let ready: Vec<_> = peers.iter_mut().map(|peer| peer.prepare(&Problem::default())).collect();
        assert_eq!(ready, [Ok(()), Err("no kernel".to_string())]);
        assert_eq!(peers[0].calls(3, true).unwrap(), [1.0, 3.0, 1.0]);
        assert!(peers[0].calls(2, true).is_err(), "three times for two calls");
    }

    #[test]
    fn what_goes_wrong_is_said() {
        assert_eq!(shell("echo error no module").err().unwrap(), "no module");
        assert_eq!(shell("exit 3").err().unwrap(), "the process ended without an answer");
        assert_eq!(shell("echo hello").err().unwrap(), "expected \"ready\", found \"hello\"");
        let mut peer =
            shell("echo ready x; read -r _; echo seconds soon; read -r _; echo error no memory").unwrap();
        assert_eq!(peer.call().unwrap_err().to_string(), "not 1 times: \"soon\"");
        assert_eq!(peer.call().unwrap_err().to_string(), "no memory");
        let missing = Peer::start(&mut Command::new("hyperattn-no-such-program"), Target::Cpu).err().unwrap();
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
