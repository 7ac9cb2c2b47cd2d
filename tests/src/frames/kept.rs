//! Frames that were found once, run again each time.

use super::history::Bench;

const KEPT: &str = include_str!("kept.txt");

/// Name of a reason, and a frame.
fn parse(text: &str) -> Result<Vec<(&str, Vec<u8>)>, String> {
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let frame = |digits: &str| {
        let byte = |at: usize| digits.get(at..at + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok());
        (0..digits.len()).step_by(2).map(byte).collect::<Option<Vec<u8>>>()
    };
    lines
        .map(|line| {
            let parts = line.split_once(' ').and_then(|(reason, digits)| Some((reason, frame(digits.trim())?)));
            parts.ok_or_else(|| format!("not `REASON HEX`: {line}"))
        })
        .collect()
}

/// Runs them all; how many there are.
///
/// # Errors
/// The frames for which something does not hold.
pub fn run(bench: &mut Bench) -> Result<usize, String> {
    let kept = parse(KEPT)?;
    let mut wrong = Vec::new();
    for (name, frame) in &kept {
        match bench.single(frame) {
            Ok(reason) if reason.name() == *name => {}
            Ok(reason) => wrong.push(format!("{} instead of {name}: {}", reason.name(), super::history::hex(frame))),
            Err(error) => wrong.push(format!("{error}: {}", super::history::hex(frame))),
        }
    }
    if wrong.is_empty() { Ok(kept.len()) } else { Err(wrong.join("\n")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_a_reason_and_a_frame() {
        assert_eq!(parse("# x\n\nplain 00ff\n"), Ok(vec![("plain", vec![0, 0xff])]));
        assert!(parse("plain").is_err() && parse("plain 0").is_err() && parse("plain 0g").is_err());
    }
}
