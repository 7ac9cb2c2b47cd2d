//! TOML that is read strictly: a mistake is an error that names file, line and column, and for an unknown key the
//! nearest key that exists.
//!
//! The types say which keys exist: `#[serde(deny_unknown_fields)]` on every struct is all that this needs. (Behind
//! `flatten` and untagged enums serde no longer knows where a key stood; the message is then the same without a line.)

use std::fmt;
use std::path::{Path, PathBuf};

use std::str::FromStr;

use serde::de::{self, Deserialize, DeserializeOwned, Deserializer};
use thiserror::Error;

/// Why a configuration file could not be read. The text is for the operator: `FILE:LINE:COLUMN: what to do`.
#[derive(Debug, Error)]
pub enum FileError {
    /// The file cannot be opened or read.
    #[error("{}: cannot read the configuration: {source}", path.display())]
    Read {
        /// The file that was asked for.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is not what it should be.
    #[error("{}:{mistake}", path.display())]
    Mistake {
        /// The file that was read.
        path: PathBuf,
        /// Where in it, and what.
        mistake: Mistake,
    },
}

/// One mistake in a TOML text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    /// Line and column, both from 1, the column in characters; absent where the position is not known.
    pub place: Option<(usize, usize)>,
    /// What is wrong, and what to do about it.
    pub message: String,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.place {
            Some((line, column)) => write!(f, "{line}:{column}: {}", self.message),
            None => write!(f, " {}", self.message),
        }
    }
}

impl std::error::Error for Mistake {}

/// Reads a TOML file into `T`.
///
/// # Errors
/// See [`FileError`]; only the first mistake is reported.
pub fn read_file<T: DeserializeOwned>(path: &Path) -> Result<T, FileError> {
    let text = std::fs::read_to_string(path).map_err(|source| FileError::Read { path: path.into(), source })?;
    parse(&text).map_err(|mistake| FileError::Mistake { path: path.into(), mistake })
}

/// Reads a TOML text into `T`.
///
/// # Errors
/// The first [`Mistake`]: bad syntax, a value of the wrong type, a missing or an unknown key.
pub fn parse<T: DeserializeOwned>(text: &str) -> Result<T, Mistake> {
    toml::from_str(text).map_err(|error| {
        let (offset, message) = match placed(error.message()) {
            Some((offset, message)) => (Some(offset), message),
            None => (error.span().map(|span| span.start), error.message()),
        };
        Mistake {
            place: offset.map(|offset| place(text, offset)),
            message: unknown_key(message).unwrap_or_else(|| message.trim_end().to_owned()),
        }
    })
}

/// A value that is written as a string and read by its [`FromStr`], such as an address or `tcp/80`: what `FromStr` says
/// about a bad one is reported at its place in the file. For TOML only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Text<T>(pub T);

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = toml::Spanned::<String>::deserialize(deserializer)?;
        let offset = text.span().start;
        text.get_ref().parse().map(Self).map_err(|error| de::Error::custom(format_args!("{MARK}{offset}{MARK}{error}")))
    }
}

/// Sets off an offset at the head of a message, see [`placed`]. No message of serde or toml begins with it.
const MARK: char = '\u{1}';

/// Takes the offset off a message of [`Text`]: toml itself would name the beginning of the array that the value is in,
/// which may be lines away.
fn placed(message: &str) -> Option<(usize, &str)> {
    let (offset, message) = message.strip_prefix(MARK)?.split_once(MARK)?;
    Some((offset.parse().ok()?, message))
}

/// Line and column (both from 1, the column in characters) of a byte offset in `text`, for mistakes that are found
/// only after parsing, in a value that was kept as `toml::Spanned`.
pub fn place(text: &str, offset: usize) -> (usize, usize) {
    let offset = (0..=offset.min(text.len())).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
    let before = &text[..offset];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// The candidate that `word` was most likely meant to be, if one is near enough to be worth naming.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    /// Below this, Jaro-Winkler names words that have nothing to do with each other.
    const NEAR: f64 = 0.7;
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(&word.to_lowercase(), candidate), candidate))
        .filter(|(likeness, _)| *likeness >= NEAR)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

/// Rewrites serde's message about an unknown key; `None` if `message` is about something else.
///
/// serde has one fixed wording for it (`serde::de::Error::unknown_field`), and the list of keys in it is the only place
/// where the keys of a derived struct can be learned.
fn unknown_key(message: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown field `")?;
    let (key, expected) = match rest.split_once("`, expected ") {
        Some(parts) => parts,
        None => (rest.split_once("`, there are no fields")?.0, ""),
    };
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    Some(match nearest(key, known.iter().copied()) {
        Some(near) => format!("unknown key `{key}`; did you mean `{near}`?"),
        None if known.is_empty() => format!("unknown key `{key}`; no key is allowed here"),
        None => format!("unknown key `{key}`; the keys here are {}", known.join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Top {
        #[serde(default)]
        interfaces: Vec<String>,
        #[serde(default)]
        keepalive: Option<f64>,
        #[serde(default)]
        farm: Vec<Farm>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Farm {
        name: String,
        #[serde(default)]
        servers: Vec<String>,
        #[serde(default)]
        capacity: BTreeMap<String, f64>,
    }

    fn mistake(text: &str) -> Mistake {
        parse::<Top>(text).expect_err("the text has a mistake")
    }

    #[test]
    fn a_good_file_is_read() {
        let top: Top = parse(
            "interfaces = ['eth0']\nkeepalive = 5.0\n[[farm]]\nname = 'web'\nservers = ['10.0.0.0/24']\n\
             capacity = { '10.0.0.1' = 2.0 }\n",
        )
        .expect("no mistake in it");
        assert_eq!((top.interfaces.len(), top.keepalive), (1, Some(5.0)));
        assert_eq!((top.farm[0].name.as_str(), top.farm[0].servers.len()), ("web", 1));
        assert_eq!(top.farm[0].capacity["10.0.0.1"], 2.0);
    }

    #[test]
    fn an_unknown_key_names_its_line_and_the_nearest_key() {
        let found = mistake("interfaces = []\n\n  keep_alive = 5.0\n");
        assert_eq!(found.to_string(), "3:3: unknown key `keep_alive`; did you mean `keepalive`?");
    }

    #[test]
    fn an_unknown_key_in_a_nested_table_is_compared_with_the_keys_of_that_table() {
        let found = mistake("[[farm]]\nname = 'web'\n[[farm]]\nname = 'b'\nserver = []\n");
        assert_eq!(found.to_string(), "5:1: unknown key `server`; did you mean `servers`?");
        let found = mistake("[[farm]]\nname = 'web'\ninterfaces = []\n");
        assert_eq!(found.to_string(), "3:1: unknown key `interfaces`; the keys here are name, servers, capacity");
    }

    #[test]
    fn an_unknown_table_is_found_at_its_header() {
        let found = mistake("interfaces = []\n[[farms]]\nname = 'web'\n");
        assert_eq!(found.place.map(|(line, _)| line), Some(2));
        assert_eq!(found.message, "unknown key `farms`; did you mean `farm`?");
    }

    #[test]
    fn other_mistakes_name_their_line_too() {
        assert_eq!(mistake("interfaces = []\nkeepalive = 'x'\n").place, Some((2, 13)));
        assert_eq!(mistake("interfaces = [\n").place.map(|(line, _)| line), Some(1));
        assert!(mistake("[[farm]]\nservers = []\n").message.contains("missing field `name`"));
    }

    #[test]
    fn a_text_that_does_not_parse_is_found_at_its_place() {
        #[derive(Debug, Deserialize)]
        struct Ports {
            ports: Vec<Text<u16>>,
        }
        let found = parse::<Ports>("ports = ['1',\n  'x']\n").expect_err("x is no port");
        assert_eq!((found.place, found.message.as_str()), (Some((2, 3)), "invalid digit found in string"));
        assert_eq!(parse::<Ports>("ports = ['1']").expect("a port").ports, [Text(1)]);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read_file::<Top>(Path::new("/nonexistent/ne.toml")).expect_err("no such file");
        assert!(error.to_string().starts_with("/nonexistent/ne.toml: cannot read"), "{error}");
    }

    #[test]
    fn places_count_characters_and_never_split_one() {
        assert_eq!(place("äöü = 1", 2), (1, 2));
        assert_eq!(place("äöü = 1", 1), (1, 1));
        assert_eq!(place("a\nb", 99), (2, 2));
    }

    #[test]
    fn hostile_keys_do_not_confuse_the_message() {
        let found = mistake("'a`, expected `b`' = 1\n");
        assert!(found.message.starts_with("unknown key `a"), "{found}");
        assert_eq!(found.place, Some((1, 1)));
    }
}
