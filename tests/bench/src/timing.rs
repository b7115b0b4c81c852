//! Calls of several members in turns, A B A B, so that a change of the machine's speed meets all of them.

use std::error::Error;
use std::time::Duration;

use crate::statistics::Summary;

/// Something that can be timed again and again.
pub trait Member {
    /// The seconds of one call.
    ///
    /// # Errors
    /// What the call answers.
    fn call(&mut self) -> Result<f64, Box<dyn Error>>;

    /// The seconds of each of `count` calls, and before them with `warm_up` one that is not timed.
    ///
    /// # Errors
    /// What a call answers.
    fn calls(&mut self, count: usize, warm_up: bool) -> Result<Vec<f64>, Box<dyn Error>> {
        if warm_up {
            self.call()?;
        }
        (0..count).map(|_| self.call()).collect()
    }

    /// Turns of calls shorter than this begin with one that is not timed: caches and clock rate are then the
    /// member's own again.
    fn short(&self) -> f64 {
        SHORT
    }

    /// It is this member's turn.
    fn begin(&mut self) {}

    /// The turn ends. Waits until what the calls left running has gone, before it is another member's turn.
    fn rest(&mut self) {}
}

/// See [`Member::short`].
pub const SHORT: f64 = 2e-3;

/// Fewest and most turns.
const TURNS: [f64; 2] = [3.0, 30.0];

/// Most timed calls of a member in a turn.
pub const MOST_CALLS: usize = 50;

/// A member whose first call is longer than this many budgets is not called again: that call counts.
const LONG: f64 = 10.0;

/// The seconds of every timed call of one member.
#[derive(Clone, Debug, PartialEq)]
pub struct Times {
    turns: Vec<Vec<f64>>,
}

impl Times {
    /// Over all calls.
    pub fn summary(&self) -> Summary {
        Summary::of(&self.turns.concat())
    }

    /// Timed calls.
    pub fn runs(&self) -> usize {
        self.turns.iter().map(Vec::len).sum()
    }

    /// This time over the time of `base`, turn by turn where both ran in every turn.
    pub fn over(&self, base: &Times) -> Summary {
        if self.turns.len() != base.turns.len() {
            return Summary::of(&[self.summary().median / base.summary().median]);
        }
        let medians =
            |times: &Times| -> Vec<f64> { times.turns.iter().map(|turn| Summary::of(turn).median).collect() };
        let ratios: Vec<f64> = medians(self).iter().zip(medians(base)).map(|(a, b)| a / b).collect();
        Summary::of(&ratios)
    }
}

/// Times every member: one call each as a warm-up, then turns until each has had about `budget`, at
/// least three.
///
/// # Errors
/// The first that a member answers.
pub fn in_turns(members: &mut [&mut dyn Member], budget: Duration) -> Result<Vec<Times>, Box<dyn Error>> {
    let budget = budget.as_secs_f64();
    let mut first = Vec::new();
    for member in members.iter_mut() {
        member.begin();
        // The second call of a short member says more: the first one faults its pages in.
        let mut seconds = member.call()?;
        if seconds < budget {
            seconds = member.call()?;
        }
        member.rest();
        first.push(seconds.max(1e-9));
    }
    let long = |seconds: f64| seconds > LONG * budget;
    let slowest = first.iter().copied().filter(|&seconds| !long(seconds)).fold(0.0, f64::max);
    let turns = (budget / slowest).clamp(TURNS[0], TURNS[1]) as usize;
    let of_slowest = (budget / (turns as f64 * slowest)).floor().max(1.0);
    let mut times: Vec<Times> = first
        .iter()
        .map(|&seconds| Times { turns: if long(seconds) { vec![vec![seconds]] } else { Vec::new() } })
        .collect();
    for _ in 0..turns {
        for ((member, times), &seconds) in members.iter_mut().zip(&mut times).zip(&first) {
            if long(seconds) {
                continue;
            }
            member.begin();
            // Members of about the same speed are called equally often.
            let calls = of_slowest * (slowest / seconds).floor();
            let calls = calls.clamp(1.0, MOST_CALLS as f64) as usize;
            let warm_up = seconds < member.short();
            times.turns.push(member.calls(calls, warm_up)?);
            member.rest();
        }
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// Answers a time without spending it, and writes down who was called.
    struct Scripted<'a> {
        name: char,
        seconds: f64,
        calls: &'a RefCell<String>,
    }

    impl Member for Scripted<'_> {
        fn call(&mut self) -> Result<f64, Box<dyn Error>> {
            self.calls.borrow_mut().push(self.name);
            Ok(self.seconds)
        }
    }

    fn run(seconds: [f64; 2]) -> (String, Vec<Times>) {
        let calls = RefCell::new(String::new());
        let mut a = Scripted { name: 'a', seconds: seconds[0], calls: &calls };
        let mut b = Scripted { name: 'b', seconds: seconds[1], calls: &calls };
        let times = in_turns(&mut [&mut a, &mut b], Duration::from_secs(1)).unwrap();
        (calls.into_inner(), times)
    }

    #[test]
    fn members_alternate() {
        let (calls, times) = run([0.2, 0.21]);
        assert_eq!(calls, "aabb".to_string() + &"ab".repeat(4));
        assert_eq!((times[0].runs(), times[1].runs()), (4, 4));
        assert!((times[1].over(&times[0]).median - 1.05).abs() < 1e-12);
    }

    #[test]
    fn a_faster_member_is_called_more_often_in_each_turn() {
        let (calls, times) = run([0.05, 0.2]);
        assert_eq!(calls, "aabb".to_string() + &"aaaab".repeat(5));
        assert_eq!((times[0].runs(), times[1].runs()), (20, 5));
        assert_eq!(times[1].over(&times[0]).median, 4.0);
    }

    #[test]
    fn a_long_member_is_called_once() {
        let (calls, times) = run([0.9, 60.0]);
        assert_eq!(calls, "aab".to_string() + "aaa");
        assert_eq!((times[0].runs(), times[1].runs()), (3, 1));
        assert_eq!(times[1].summary().median, 60.0);
        assert!((times[1].over(&times[0]).median - 60.0 / 0.9).abs() < 1e-12);
        let (calls, times) = run([30.0, 60.0]);
        assert_eq!((calls.as_str(), times[0].runs()), ("ab", 1));
        assert_eq!(times[1].over(&times[0]).median, 2.0);
    }

    #[test]
    fn short_calls_are_warmed_up_in_each_turn() {
        let (calls, times) = run([1e-4, 1e-4]);
        assert_eq!(times[0].runs(), 30 * 50);
        assert_eq!(calls.len(), 4 + 30 * 2 * 51);
    }

    #[test]
    fn the_ratio_is_taken_turn_by_turn() {
        // The machine halves its speed after the first turn; the ratio does not see it.
        let base = Times { turns: vec![vec![1.0], vec![2.0], vec![2.0]] };
        let other = Times { turns: vec![vec![3.0], vec![6.0], vec![6.0]] };
        assert_eq!(other.over(&base), Summary { median: 3.0, low: 3.0, high: 3.0 });
    }
}
