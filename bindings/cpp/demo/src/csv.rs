//! Reads the table that the C program writes.

use std::str::FromStr;

const HEADER: &str = "input,method,mask,n,runs,time_ms,speedup,error,keys_per_query";

/// One measurement.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// `real` or `clusters`.
    pub input: String,
    /// `EXACT`, `PAPER UNIFORM`, ...
    pub method: String,
    /// `full` or `causal`.
    pub mask: String,
    /// Tokens.
    pub n: u64,
    /// Timed runs.
    pub runs: u32,
    /// Median of the runs.
    pub time_ms: f64,
    /// Time of EXACT divided by this time.
    pub speedup: f64,
    /// Relative Frobenius error of the output.
    pub error: f64,
    /// Key columns that a query meets on average; `None` where the program could not tell.
    pub keys_per_query: Option<f64>,
}

/// All rows, in order.
///
/// # Errors
/// A sentence that names the line and the field.
pub fn parse(text: &str) -> Result<Vec<Row>, String> {
    let mut lines = text.lines().enumerate();
    match lines.next() {
        Some((_, HEADER)) => {}
        other => {
            return Err(format!("line 1: expected \"{HEADER}\", found {:?}", other.map(|(_, line)| line)));
        }
    }
    let rows: Vec<Row> = lines
        .map(|(index, line)| row(line).map_err(|e| format!("line {}: {e}", index + 1)))
        .collect::<Result<_, _>>()?;
    if rows.is_empty() { Err("no rows".to_string()) } else { Ok(rows) }
}

fn row(line: &str) -> Result<Row, String> {
    let fields: Vec<&str> = line.split(',').collect();
    let [input, method, mask, n, runs, time_ms, speedup, error, keys_per_query] = fields[..] else {
        return Err(format!("expected {} fields, found {}", HEADER.split(',').count(), fields.len()));
    };
    Ok(Row {
        input: input.to_string(),
        method: method.to_string(),
        mask: mask.to_string(),
        n: number("n", n)?,
        runs: number("runs", runs)?,
        time_ms: finite("time_ms", time_ms)?,
        speedup: finite("speedup", speedup)?,
        error: finite("error", error)?,
        keys_per_query: match keys_per_query {
            "" => None,
            text => Some(finite("keys_per_query", text)?),
        },
    })
}

fn number<T: FromStr>(name: &str, text: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{name} is not a number: {text:?}"))
}

/// A NaN or an infinity is no measurement and cannot be drawn.
fn finite(name: &str, text: &str) -> Result<f64, String> {
    let value: f64 = number(name, text)?;
    if value.is_finite() { Ok(value) } else { Err(format!("{name} is not finite: {text:?}")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_header(lines: &str) -> String {
        format!("{HEADER}\n{lines}")
    }

    #[test]
    fn reads_every_field() {
        let text = with_header(
            "real,PAPER NONE,causal,8192,5,84.98,11.1,0.233,896.5\nclusters,AUTO,full,4096,1,1e3,1,0,\n",
        );
        let rows = parse(&text).unwrap();
        assert_eq!(
            rows[0],
            Row {
                input: "real".into(),
                method: "PAPER NONE".into(),
                mask: "causal".into(),
                n: 8192,
                runs: 5,
                time_ms: 84.98,
                speedup: 11.1,
                error: 0.233,
                keys_per_query: Some(896.5),
            }
        );
        assert_eq!((rows[1].time_ms, rows[1].keys_per_query), (1000.0, None));
        assert_eq!(rows.len(), 2);
    }

    #[test]
    fn names_the_line_and_the_field() {
        let good = "real,EXACT,causal,8192,5,84.98,1,0,4096.5\n";
        let cases = [
            ("real,EXACT,causal,8192,5,84.98,1,0", "line 3: expected 9 fields, found 8"),
            ("real,EXACT,causal,8192,5,84.98,1,0,1,2", "line 3: expected 9 fields, found 10"),
            ("real,EXACT,causal,-1,5,84.98,1,0,1", "line 3: n is not a number: \"-1\""),
            ("real,EXACT,causal,8192,5,fast,1,0,1", "line 3: time_ms is not a number: \"fast\""),
            ("real,EXACT,causal,8192,5,1,inf,0,1", "line 3: speedup is not finite: \"inf\""),
            ("real,EXACT,causal,8192,5,1,1,nan,1", "line 3: error is not finite: \"nan\""),
        ];
        for (line, message) in cases {
            assert_eq!(parse(&with_header(&format!("{good}{line}\n"))).unwrap_err(), message);
        }
    }

    #[test]
    fn refuses_another_header_and_an_empty_table() {
        assert!(parse("n,time\n1,2\n").unwrap_err().starts_with("line 1: expected"));
        assert!(parse("").unwrap_err().starts_with("line 1: expected"));
        assert_eq!(parse(&with_header("")).unwrap_err(), "no rows");
    }
}
