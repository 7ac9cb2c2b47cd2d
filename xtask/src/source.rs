//! Rust source, reduced to what the architecture's rules look at: code, without comments, literals and unit tests.

/// Blanks comments, string and character literals, and items under `#[cfg(test)]`. Line breaks stay, so that line
/// numbers stay true.
pub fn code_of(source: &str) -> String {
    without_tests(&without_text(source))
}

fn without_text(source: &str) -> String {
    let bytes = source.as_bytes();
    let mut code = String::with_capacity(source.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let length = match rest[0] {
            b'/' if rest.starts_with(b"//") => line_length(rest),
            b'/' if rest.starts_with(b"/*") => block_comment_length(rest),
            b'"' => string_length(rest),
            b'r' if !ends_in_word(&code) && raw_hashes(rest).is_some() => raw_string_length(rest),
            b'\'' => char_length(rest),
            _ => 0,
        };
        if length == 0 {
            // Other bytes of a multi-byte character become blanks: no rule names them.
            code.push(if rest[0].is_ascii() { char::from(rest[0]) } else { ' ' });
            at += 1;
        } else {
            let text = &rest[..length.min(rest.len())];
            code.extend(text.iter().map(|byte| if *byte == b'\n' { '\n' } else { ' ' }));
            at += text.len();
        }
    }
    code
}

fn ends_in_word(code: &str) -> bool {
    code.chars().last().is_some_and(|last| last.is_alphanumeric() || last == '_')
}

fn line_length(rest: &[u8]) -> usize {
    rest.iter().position(|byte| *byte == b'\n').unwrap_or(rest.len())
}

fn block_comment_length(rest: &[u8]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    at
}

fn string_length(rest: &[u8]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    at
}

fn raw_hashes(rest: &[u8]) -> Option<usize> {
    let hashes = rest[1..].iter().take_while(|byte| **byte == b'#').count();
    (rest.get(1 + hashes) == Some(&b'"')).then_some(hashes)
}

fn raw_string_length(rest: &[u8]) -> usize {
    let hashes = raw_hashes(rest).unwrap_or(0);
    let end: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
    let start = 2 + hashes;
    rest[start..].windows(end.len()).position(|window| window == end).map_or(rest.len(), |at| start + at + end.len())
}

/// A character literal's length; 0 for a lifetime.
fn char_length(rest: &[u8]) -> usize {
    if rest.get(1) == Some(&b'\\') {
        return rest[3..].iter().position(|byte| *byte == b'\'').map_or(0, |at| at + 4);
    }
    let Some(text) = rest.get(1..).and_then(|text| text.get(..text.len().min(5))) else { return 0 };
    let width = match text.first() {
        Some(0..0x80) => 1,
        Some(0xc0..0xe0) => 2,
        Some(0xe0..0xf0) => 3,
        _ => 4,
    };
    if text.get(width) == Some(&b'\'') { width + 2 } else { 0 }
}

/// Blanks the item after each `#[cfg(test)]`: to its closing brace, or to a semicolon before any brace.
fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut kept = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = rest.find(MARK) {
        let (before, item) = rest.split_at(at);
        let mut depth = 0usize;
        let end = item.char_indices().find_map(|(at, character)| {
            match character {
                '{' => depth += 1,
                '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            ((character == '}' || character == ';') && depth == 0).then_some(at + 1)
        });
        let (item, after) = item.split_at(end.unwrap_or(item.len()));
        kept.push_str(before);
        kept.extend(item.chars().filter(|character| *character == '\n'));
        rest = after;
    }
    kept + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_go_and_lines_stay() {
        let source = "a /* x /* y\n */ */ b // c\nd(\"e \\\" f\", 'g', '\\n', '\\'', r#\"h \" i\"#, 'é') 'life";
        let code = code_of(source);
        assert_eq!(code.lines().count(), source.lines().count());
        assert_eq!(code.split_whitespace().collect::<Vec<_>>().join(" "), "a b d( , , , , , ) 'life");
    }

    #[test]
    fn unit_tests_go() {
        let source = "a\n#[cfg(test)]\nmod tests {\n fn f() { b }\n}\nc\n#[cfg(test)]\nmod d;\ne";
        let code = code_of(source);
        assert_eq!(code.split_whitespace().collect::<Vec<_>>(), ["a", "c", "e"]);
        assert_eq!(code.lines().count(), source.lines().count());
    }
}
