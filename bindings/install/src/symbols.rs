//! The functions that the public header declares.

/// Their names, sorted.
pub fn declared(header: &str) -> Vec<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let code = code_of(header);
    let mut names = Vec::new();
    for (at, _) in code.match_indices("hyperattn_") {
        let length = code[at..].find(|c| !is_name(c)).unwrap_or(code.len() - at);
        let called = code[at + length..].trim_start().starts_with('(');
        if called && !code[..at].ends_with(is_name) {
            names.push(code[at..at + length].to_string());
        }
    }
    names.sort();
    names.dedup();
    names
}

/// The header without comments and preprocessor lines.
fn code_of(header: &str) -> String {
    let mut code = String::new();
    let mut rest = header;
    while let Some((before, comment)) = rest.split_once("/*") {
        code.push_str(before);
        rest = comment.split_once("*/").map_or("", |(_, after)| after);
    }
    code.push_str(rest);
    let lines = code.lines().filter(|line| !line.starts_with('#'));
    lines.map(|line| line.split("//").next().unwrap_or("")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_only() {
        let header = "/* hyperattn_no(1) */\n#define X hyperattn_no(2)\n/// hyperattn_no(3)\n\
            int32_t hyperattn_b(void);\nconst char *\nhyperattn_a\n(hyperattn_type x, void (*hyperattn_no)(int));\n";
        assert_eq!(declared(header), ["hyperattn_a", "hyperattn_b"]);
    }
}
