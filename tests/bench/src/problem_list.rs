//! Lists of problems as text: one problem a line, `name=value` settings, `versus` lines for comparisons.

use crate::problem::Problem;

/// A problem with the line that asks for it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Entry {
    /// Counted from 1.
    pub line: usize,
    /// What to run.
    pub problem: Problem,
}

/// Problems that are run in turns; the first is what the others are compared with.
pub type Group = Vec<Entry>;

/// The groups of `text`. A setting with several values, separated by commas, stands for one line per
/// value; a `versus` line changes settings of the problem line above it.
///
/// # Errors
/// A sentence that begins with `file` and the line, and names the token.
pub fn parse(file: &str, text: &str) -> Result<Vec<Group>, String> {
    let mut groups: Vec<Group> = Vec::new();
    // The groups that the latest problem line made.
    let mut open = 0..0;
    for (line, content) in (1..).zip(text.lines()) {
        let mut tokens = content.split('#').next().unwrap_or_default().split_whitespace().peekable();
        let at = |token: &str, message: String| format!("{file}:{line}: \"{token}\": {message}");
        if tokens.peek().is_none() {
            continue;
        }
        if tokens.next_if_eq(&"versus").is_some() {
            if open.is_empty() {
                return Err(at("versus", "there is no problem above to compare with".to_string()));
            }
            let settings: Vec<&str> = tokens.collect();
            if settings.is_empty() {
                return Err(at("versus", "at least one setting must differ".to_string()));
            }
            for group in &mut groups[open.clone()] {
                let mut problem = group[0].problem;
                for &token in &settings {
                    let [(name, value)] = split(token).map_err(|message| at(token, message))?[..] else {
                        return Err(at(token, "a versus line takes one value".to_string()));
                    };
                    problem.set(name, value).map_err(|message| at(token, message))?;
                }
                check(&problem).map_err(|message| format!("{file}:{line}: {message}"))?;
                group.push(Entry { line, problem });
            }
            continue;
        }
        let mut problems = vec![Problem::default()];
        for token in tokens {
            let values = split(token).map_err(|message| at(token, message))?;
            let mut widened = Vec::new();
            for problem in &problems {
                for (name, value) in &values {
                    let mut problem = *problem;
                    problem.set(name, value).map_err(|message| at(token, message))?;
                    widened.push(problem);
                }
            }
            problems = widened;
        }
        open = groups.len()..groups.len() + problems.len();
        for problem in problems {
            check(&problem).map_err(|message| format!("{file}:{line}: {message}"))?;
            groups.push(vec![Entry { line, problem }]);
        }
    }
    if groups.is_empty() { Err(format!("{file}: there is no problem in it")) } else { Ok(groups) }
}

/// The name of a setting with each of its values.
fn split(token: &str) -> Result<Vec<(&str, &str)>, String> {
    let (name, values) = token.split_once('=').ok_or("a setting is written name=value")?;
    Ok(values.split(',').map(|value| (name, value)).collect())
}

/// What no single setting can be blamed for.
fn check(problem: &Problem) -> Result<(), String> {
    let (heads_q, heads_kv) = (problem.shape.heads_q, problem.shape.heads_kv);
    if heads_q.is_multiple_of(heads_kv) {
        return Ok(());
    }
    Err(format!("heads_q={heads_q} is not a multiple of heads_kv={heads_kv}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyperattn_core::Method;

    fn labels(text: &str) -> Vec<Vec<(usize, String)>> {
        let groups = parse("list.txt", text).unwrap();
        let entries = |group: &Group| group.iter().map(|entry| (entry.line, entry.problem.label())).collect();
        groups.iter().map(entries).collect()
    }

    #[test]
    fn a_line_without_settings_of_its_own_has_the_defaults() {
        let groups = parse("list.txt", "\n# nothing\n  n=1k # the default\n").unwrap();
        assert_eq!(groups, [vec![Entry { line: 3, problem: Problem::default() }]]);
    }

    #[test]
    fn several_values_are_several_problems_the_last_setting_fastest() {
        let found = labels("mask=none,causal n=64,128 heads=2");
        let expected = [
            "exact none f32 n64 d64 h2 t1",
            "exact none f32 n128 d64 h2 t1",
            "exact causal f32 n64 d64 h2 t1",
            "exact causal f32 n128 d64 h2 t1",
        ];
        assert_eq!(found, expected.map(|label| vec![(1, label.to_string())]));
    }

    #[test]
    fn versus_compares_with_every_problem_of_the_line_above() {
        let found = labels("method=auto n=64,128\nversus method=exact\nversus threads=2\nn=7\n");
        assert_eq!(found.len(), 3);
        assert_eq!(found[1][0], (1, "auto none f32 n128 d64 h1 t1".to_string()));
        assert_eq!(found[1][1], (2, "exact none f32 n128 d64 h1 t1".to_string()));
        assert_eq!(found[1][2], (3, "auto none f32 n128 d64 h1 t2".to_string()));
        assert_eq!(found[2], [(4, "exact none f32 n7 d64 h1 t1".to_string())]);
    }

    #[test]
    fn settings_are_applied_in_order() {
        let groups = parse("list.txt", "method=paper dtype=bf16 dtype_out=f32").unwrap();
        assert_eq!(groups[0][0].problem.dtypes(), "bf16/bf16/bf16/f32");
        assert_eq!(groups[0][0].problem.params.method, Method::Paper);
    }

    #[test]
    fn errors_name_the_file_the_line_and_the_token() {
        for (text, start) in [
            (
                "n=64\nn=64 speed=9",
                "list.txt:2: \"speed=9\": unknown setting; there are dtype, heads, n, method,",
            ),
            ("mask=full", "list.txt:1: \"mask=full\": the value must be one of none, causal"),
            ("\nn=64,x", "list.txt:2: \"n=64,x\": the value must be a whole number"),
            ("heads=0", "list.txt:1: \"heads=0\": the value must be at least 1"),
            ("exact", "list.txt:1: \"exact\": a setting is written name=value"),
            ("block_size=99999999999", "list.txt:1: \"block_size=99999999999\": the value must be at most"),
            ("target_error=-1", "list.txt:1: \"target_error=-1\": the value must be a number of at least 0"),
            ("method=refined first_keys=8", "list.txt:1: \"first_keys=8\": unknown setting; there are dtype"),
            ("versus n=64", "list.txt:1: \"versus\": there is no problem above"),
            ("n=64\nversus", "list.txt:2: \"versus\": at least one setting must differ"),
            ("n=64\nversus n=1,2", "list.txt:2: \"n=1,2\": a versus line takes one value"),
            ("heads_q=8 heads_kv=3", "list.txt:1: heads_q=8 is not a multiple of heads_kv=3"),
            ("# empty", "list.txt: there is no problem in it"),
        ] {
            let error = parse("list.txt", text).unwrap_err();
            assert!(error.starts_with(start), "{text:?}: {error}");
        }
    }

    #[test]
    fn the_lists_of_this_folder_are_legal() {
        let folder = crate::options::shipped_lists_folder();
        let mut count = 0;
        for entry in std::fs::read_dir(folder).expect("the folder is there") {
            let path = entry.expect("a file").path();
            let text = std::fs::read_to_string(&path).expect("text");
            parse(&path.to_string_lossy(), &text).unwrap();
            count += 1;
        }
        assert!(count >= crate::options::DEFAULT_LISTS.len());
    }
}
