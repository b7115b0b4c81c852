//! Finds the files that cargo built in the messages it prints with `--message-format=json`.

use std::path::PathBuf;

/// The paths in every `"filenames"` list of the messages, in order.
pub(crate) fn filenames(messages: &str) -> Vec<PathBuf> {
    messages
        .lines()
        .filter(|line| line.contains("\"reason\":\"compiler-artifact\""))
        .filter_map(|line| line.split_once("\"filenames\":["))
        .flat_map(|(_, list)| strings(list))
        .map(PathBuf::from)
        .collect()
}

/// The JSON strings up to the closing bracket of a list whose opening bracket was already read.
fn strings(list: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut characters = list.chars();
    loop {
        match characters.next() {
            Some('"') => match string(&mut characters) {
                Some(text) => found.push(text),
                None => return found,
            },
            Some(']') | None => return found,
            Some(_) => {}
        }
    }
}

/// One JSON string after its opening quote; `None` when it is malformed.
fn string(characters: &mut std::str::Chars<'_>) -> Option<String> {
    // UTF-16, because JSON escapes characters outside the basic plane as two surrogates.
    let mut units: Vec<u16> = Vec::new();
    loop {
        let mut buffer = [0; 2];
        let character = match characters.next()? {
            '"' => return String::from_utf16(&units).ok(),
            '\\' => match characters.next()? {
                'u' => {
                    let digits: String = characters.by_ref().take(4).collect();
                    units.push(u16::from_str_radix(&digits, 16).ok()?);
                    continue;
                }
                'b' => '\u{8}',
                'f' => '\u{c}',
                'n' => '\n',
                'r' => '\r',
                't' => '\t',
                other => other,
            },
            other => other,
        };
        units.extend_from_slice(character.encode_utf16(&mut buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filenames_of_artifacts_only() {
        let messages = concat!(
            r#"{"reason":"build-script-executed","filenames":["/no"]}"#,
            "\n",
            r#"{"reason":"compiler-artifact","target":{"name":"x"},"filenames":["/a b/libx.a","C:\\d\\\"e\".so"],"fresh":true}"#,
            "\n",
            r#"{"reason":"compiler-artifact","filenames":["/\u00e9\ud83d\ude00/z"],"executable":null}"#,
            "\n",
            r#"{"reason":"compiler-artifact","filenames":[]}"#,
        );
        let expected = ["/a b/libx.a", "C:\\d\\\"e\".so", "/\u{e9}\u{1f600}/z"].map(PathBuf::from);
        assert_eq!(filenames(messages), expected);
    }

    #[test]
    fn malformed_lists_end_the_search() {
        assert!(filenames(r#"{"reason":"compiler-artifact","filenames":["/cut"#).is_empty());
    }
}
