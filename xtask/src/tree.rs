//! The architecture's invariants that can be read off the source: who may name what.

use std::{
    fmt::{self, Display, Formatter},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use crate::source::code_of;

/// In `within`, outside `except`, none of `names` may appear in code.
struct Rule {
    /// Files or directories, from the workspace's root.
    within: &'static [&'static str],
    except: &'static [&'static str],
    /// Paths of the language, matched as whole words.
    names: &'static [&'static str],
    because: &'static str,
}

const RULES: &[Rule] = &[
    Rule {
        within: &["necp-user/src/necp", "necp-user/src/control"],
        except: &[],
        names: &[
            "TcpListener",
            "TcpStream",
            "UdpSocket",
            "UnixListener",
            "UnixStream",
            "socket2",
            "libc",
            "std::fs",
            "std::env",
            "std::process",
            "std::thread",
            "println",
            "eprintln",
        ],
        because: "the protocol core and the decisions do no I/O",
    },
    Rule {
        within: &["necp-user/src/necp", "necp-user/src/control"],
        except: &[],
        names: &["Instant::now", "SystemTime", ".elapsed"],
        because: "the protocol core and the decisions read no clock: `now` is an argument",
    },
    Rule {
        within: &["necp-user/src", "xtask/src"],
        except: &["necp-user/src/plane"],
        names: &["aya", "aya_log", "rtnetlink", "netlink_packet_route"],
        because: "aya and netlink are named in plane/ only",
    },
    Rule {
        within: &["necp-user/src", "necp-ebpf", "xtask/src"],
        except: &["necp-user/src/client", "necp-user/src/daemon", "necp-user/src/main.rs"],
        names: &["tokio"],
        because: "tokio is named in client/, daemon/ and main.rs only",
    },
    Rule {
        within: &[
            "necp-ebpf/src/abi.rs",
            "necp-ebpf/src/headers.rs",
            "necp-ebpf/src/parse.rs",
            "necp-ebpf/src/steer.rs",
            "necp-ebpf/src/rewrite",
            "necp-ebpf/src/icmp.rs",
            "necp-ebpf/src/verdict.rs",
        ],
        except: &[],
        names: &["aya_ebpf", "aya_log_ebpf"],
        because: "what decides runs on the host too: it knows no map and no helper",
    },
    Rule {
        within: &["necp-ebpf", "necp-user", "xtask", "tests"],
        except: &[],
        names: &["#[ignore"],
        because: "a test that cannot run fails and says what is missing",
    },
];

/// A line that breaks a rule.
#[derive(Debug, PartialEq, Eq)]
pub struct Offence {
    file: PathBuf,
    line: usize,
    name: &'static str,
    because: &'static str,
}

impl Display for Offence {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: `{}`: {}", self.file.display(), self.line, self.name, self.because)
    }
}

/// Holds every rule against every Rust file of the tree.
pub fn check(root: &Path) -> Result<Vec<Offence>> {
    let sources = sources(root)?;
    let tests: Vec<PathBuf> = sources.iter().flat_map(|(file, source)| test_modules(file, source)).collect();
    let is_test =
        |file: &Path| tests.iter().any(|module| file.starts_with(module) || file == module.with_extension("rs"));
    let product = sources.iter().filter(|(file, _)| !is_test(file));
    Ok(product.flat_map(|(file, source)| check_file(file, source)).collect())
}

/// Every Rust file of the tree, by its path from the workspace's root.
pub fn sources(root: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut files = Vec::new();
    for package in ["necp-ebpf", "necp-user", "xtask", "tests"] {
        collect(&root.join(package), &mut files)?;
    }
    ensure!(!files.is_empty(), "found no source below {}", root.display());
    files.sort();
    let mut sources = Vec::new();
    for file in files {
        let source = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        sources.push((file.strip_prefix(root)?.to_owned(), source));
    }
    Ok(sources)
}

/// The modules with files of their own that a file declares for tests only, without the ending `.rs`.
fn test_modules(file: &Path, source: &str) -> Vec<PathBuf> {
    let dir = match file.file_stem().and_then(|stem| stem.to_str()) {
        Some("mod" | "lib" | "main") => file.parent().unwrap_or(Path::new("")).to_owned(),
        _ => file.with_extension(""),
    };
    let lines = source.lines().zip(source.lines().skip(1));
    let for_tests = |attribute: &str| ["#[cfg(test)]", "#[cfg(any(test, fuzzing))]"].contains(&attribute.trim());
    let declared = lines.filter(|(attribute, _)| for_tests(attribute)).filter_map(|(_, line)| {
        let name = line.trim().strip_suffix(';')?.rsplit_once("mod ")?.1;
        Some(dir.join(name))
    });
    declared.collect()
}

fn check_file(file: &Path, source: &str) -> Vec<Offence> {
    let code = code_of(source);
    let mut offences = Vec::new();
    for rule in RULES.iter().filter(|rule| rule.covers(file)) {
        for (at, line) in code.lines().enumerate() {
            let named = rule.names.iter().filter(|name| has_word(line, name));
            offences.extend(named.map(|name| Offence { file: file.into(), line: at + 1, name, because: rule.because }));
        }
    }
    offences
}

impl Rule {
    fn covers(&self, file: &Path) -> bool {
        let among = |places: &[&str]| places.iter().any(|place| file.starts_with(place));
        among(self.within) && !among(self.except)
    }
}

fn has_word(line: &str, name: &str) -> bool {
    let in_word = |character: char| character.is_alphanumeric() || character == '_';
    line.match_indices(name).any(|(at, _)| {
        !(name.starts_with(in_word) && line[..at].ends_with(in_word))
            && (name.starts_with('#') || !line[at + name.len()..].starts_with(in_word))
    })
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() && !path.ends_with("target") {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(file: &str, source: &str) -> Vec<&'static str> {
        check_file(Path::new(file), source).into_iter().map(|offence| offence.name).collect()
    }

    #[test]
    fn the_core_reads_no_clock_and_opens_no_socket() {
        let source = "use std::net::TcpStream;\nlet now = Instant::now();";
        assert_eq!(names("necp-user/src/necp/session.rs", source), ["TcpStream", "Instant::now"]);
        assert_eq!(names("necp-user/src/control/plan.rs", source), ["TcpStream", "Instant::now"]);
        assert!(names("necp-user/src/daemon/peer.rs", source).is_empty());
    }

    #[test]
    fn each_runtime_has_its_place() {
        assert_eq!(names("necp-user/src/config.rs", "use tokio::net;\nuse aya::Ebpf;"), ["aya", "tokio"]);
        assert_eq!(names("necp-user/src/plane/load.rs", "use tokio::net;\nuse aya::Ebpf;"), ["tokio"]);
        assert_eq!(names("necp-user/src/daemon/ne.rs", "use tokio::net;\nuse aya::Ebpf;"), ["aya"]);
        assert_eq!(names("necp-user/src/client/peer.rs", "use tokio::net;\nuse aya::Ebpf;"), ["aya"]);
        assert_eq!(names("necp-ebpf/src/steer.rs", "use aya_ebpf::maps::Array;"), ["aya_ebpf"]);
    }

    #[test]
    fn words_are_whole_and_comments_free() {
        let source = "// aya\nlet ayah = malaya(\"tokio\"); /// tokio\n#[cfg(test)]\nmod tests { use tokio; }";
        assert!(names("necp-user/src/config.rs", source).is_empty());
    }

    #[test]
    fn modules_for_tests_are_known_by_their_declaration() {
        let source = "#[cfg(test)]\nmod tests;\n#[cfg(any(test, fuzzing))]\npub(crate) mod bed;\nmod real;";
        let paths = |file: &str| test_modules(Path::new(file), source);
        assert_eq!(paths("a/b.rs"), [Path::new("a/b/tests"), Path::new("a/b/bed")]);
        assert_eq!(paths("a/mod.rs"), [Path::new("a/tests"), Path::new("a/bed")]);
    }

    #[test]
    fn a_method_is_not_a_name() {
        assert_eq!(names("necp-user/src/necp/x.rs", "let t = start.elapsed(); let elapsed = 1;"), [".elapsed"]);
    }

    #[test]
    fn offences_say_where() {
        let offences = check_file(Path::new("necp-user/src/necp/wire.rs"), "\n\nuse tokio;");
        assert!(offences[0].to_string().starts_with("necp-user/src/necp/wire.rs:3: `tokio`"));
        assert_eq!(names("tests/tests/x.rs", "#[ignore = \"slow\"]"), ["#[ignore"]);
    }
}
