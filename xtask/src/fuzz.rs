//! `cargo xtask fuzz`: the fuzz targets of necp-user/fuzz, from seeds that the messages written by hand give; and the
//! packet path's own fuzzer, `necp-frames` of the tests.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};

use crate::{
    host::{Host, say},
    setup,
};

const MESSAGES: &str = "necp-user/src/necp/vectors/messages.txt";
/// Longest script, in bytes.
const LONGEST: &str = "-max_len=256";
/// Seconds for each target of `--smoke`.
const SMOKE: u64 = 10;

/// Arguments of `cargo xtask fuzz`.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct FuzzArgs {
    /// Which target; those of the protocol core if none is named
    #[arg(value_enum)]
    target: Option<Target>,
    /// Seconds for each target
    #[arg(long, value_name = "N", default_value_t = 60, conflicts_with = "runs")]
    seconds: u64,
    /// Executions of each target, instead of a time
    #[arg(long, value_name = "N")]
    runs: Option<u64>,
    /// A short run of all, as continuous integration does
    #[arg(long, conflicts_with_all = ["seconds", "runs", "target", "blind"])]
    smoke: bool,
    /// Without coverage: random changes to what was found so far, several times as fast
    #[arg(long, conflicts_with = "runs")]
    blind: bool,
    /// Further arguments for the fuzzer of frames, e.g. `-- --host`
    #[arg(last = true, value_name = "ARG")]
    rest: Vec<String>,
}

const EXAMPLES: &str = "Examples:
  cargo xtask fuzz session --seconds 600
  cargo xtask fuzz wire --blind --seconds 600
  cargo xtask fuzz frames --seconds 600                  kernel program, host build and etherparse (root)
  cargo xtask fuzz frames --seconds 600 -- --host        host build and etherparse, many times as fast
  cargo xtask fuzz frames -- --seed 7 --history 12       one history again, as a finding says";

/// A fuzz target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// The decoder, however a stream is cut
    Wire,
    /// The session machines of both roles, against any peer
    Session,
    /// The packet path: kernel program and host build on random frames, judged by etherparse (root)
    Frames,
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::Session => "session",
            Self::Frames => "frames",
        }
    }

    /// What stands before a stream in a script: how it is cut; or the role, its start (open; with a key, and not open
    /// yet; with a key, and open), the step that feeds bytes.
    fn seeds(self, message: &[u8]) -> Vec<Vec<u8>> {
        match self {
            Self::Wire => vec![[&[7], message].concat()],
            Self::Session => {
                let length = message.len().min(255);
                let fed = |role: u8, start: u8| {
                    [&[role, start, 0, length as u8], &message[..length], &[11, 0, 12, 14]].concat()
                };
                [1, 0x10, 0x11].into_iter().flat_map(|start| [fed(0, start), fed(1, start)]).collect()
            }
            // It makes its own.
            Self::Frames => Vec::new(),
        }
    }
}

/// Runs the targets; a crash fails, and its input is kept below necp-user/fuzz/artifacts.
pub fn fuzz(host: &Host, args: &FuzzArgs) -> Result<ExitCode> {
    if args.target == Some(Target::Frames) {
        return frames(host, args);
    }
    setup::fuzz(host)?;
    let messages = messages(&host.root)?;
    let targets = args.target.map_or_else(|| vec![Target::Wire, Target::Session], |target| vec![target]);
    let mut failed = Vec::new();
    for target in targets {
        let corpus = seed(host, target, &messages)?;
        let mut command =
            if args.blind { blind(host, target, args, &corpus) } else { guided(host, target, args, &corpus) };
        let status = command.status().context("cargo did not start")?;
        say(format_args!("fuzz {}: {}", target.name(), if status.success() { "ok" } else { "FAILED" }));
        if !status.success() {
            failed.push(target.name());
        }
    }
    for target in &failed {
        eprintln!("xtask: an input that fails is below necp-user/fuzz/artifacts/{target}, or named above; put it into");
        eprintln!("xtask: the table in necp-user/src/necp/chaos/tests.rs, and fix what it shows");
    }
    let core = if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    if !args.smoke {
        return Ok(core);
    }
    let frames = frames(host, args)?;
    Ok(if frames == ExitCode::SUCCESS { core } else { frames })
}

/// The packet path's fuzzer.
fn frames(host: &Host, args: &FuzzArgs) -> Result<ExitCode> {
    ensure!(args.runs.is_none() && !args.blind, "frames are fuzzed for a time, and never with coverage");
    if !args.rest.iter().any(|word| word == "--host") {
        host.require_root("running the kernel program (without root: `cargo xtask fuzz frames -- --host`)")?;
    }
    setup::build(host)?;
    let mut command =
        host.cargo(["run", "--quiet", "--release", "--package", "necp-tests", "--bin", "necp-frames", "--"]);
    let seconds = if args.smoke { SMOKE } else { args.seconds };
    command.args(["--seconds", &seconds.to_string()]).args(&args.rest);
    let passed = command.status().context("cargo did not start")?.success();
    say(format_args!("fuzz frames: {}", if passed { "ok" } else { "FAILED" }));
    if !passed {
        eprintln!(
            "xtask: put the frame, with what it is an example of, into tests/src/frames/kept.txt, and fix what it shows"
        );
    }
    Ok(if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// libFuzzer, guided by coverage. The pinned toolchain is no nightly: no sanitizer, and leave to use `-Z`.
fn guided(host: &Host, target: Target, args: &FuzzArgs, corpus: &Path) -> Command {
    let mut command = host.cargo(["fuzz", "run", "--sanitizer", "none", "--no-trace-compares", target.name()]);
    command.current_dir(host.root.join("necp-user")).env("RUSTC_BOOTSTRAP", "1");
    command.arg(corpus).args(["--", LONGEST, "-print_final_stats=1", "-verbosity=0"]);
    match args.runs {
        Some(runs) => command.arg(format!("-runs={runs}")),
        None => command.arg(format!("-max_total_time={}", if args.smoke { SMOKE } else { args.seconds })),
    };
    command
}

fn blind(host: &Host, target: Target, args: &FuzzArgs, corpus: &Path) -> Command {
    let mut command =
        host.cargo(["run", "--quiet", "--release", "--bin", "blind", "--target-dir", "target/blind", "--"]);
    command.current_dir(host.root.join("necp-user/fuzz"));
    let seed = std::time::UNIX_EPOCH.elapsed().map_or(0, |time| time.as_secs());
    command.args([target.name(), &args.seconds.to_string(), &seed.to_string()]).arg(corpus);
    command
}

/// Puts the messages into the target's corpus, each by itself.
fn seed(host: &Host, target: Target, messages: &[(String, Vec<u8>)]) -> Result<PathBuf> {
    let corpus = host.root.join("necp-user/fuzz/corpus").join(target.name());
    fs::create_dir_all(&corpus).with_context(|| format!("cannot make {}", corpus.display()))?;
    for (name, message) in messages {
        for (at, script) in target.seeds(message).iter().enumerate() {
            fs::write(corpus.join(format!("{name}-{at}")), script)?;
        }
    }
    Ok(corpus)
}

/// The messages written by hand: names and bytes.
fn messages(root: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let file = root.join(MESSAGES);
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    parse(&text)
}

fn parse(text: &str) -> Result<Vec<(String, Vec<u8>)>> {
    let mut messages: Vec<(String, Vec<u8>)> = Vec::new();
    for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let Some(line) = line.strip_prefix("    ") else {
            messages.push((line.split(' ').next().unwrap_or_default().into(), Vec::new()));
            continue;
        };
        let digits: String = line.split(['=', '~', '!']).next().unwrap_or_default().split_whitespace().collect();
        let (_, bytes) = messages.last_mut().context("a message begins with its name")?;
        for at in (0..digits.len()).step_by(2) {
            let pair = digits.get(at..at + 2).context("an odd number of digits")?;
            bytes.push(u8::from_str_radix(pair, 16).with_context(|| format!("`{line}` is not hexadecimal"))?);
        }
    }
    ensure!(!messages.is_empty(), "no messages in {MESSAGES}");
    Ok(messages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_become_seeds() {
        let text = "# comment\n\nnoop §5.3 both\n    414a 0000 = NOOP\n    01\nstop §5.6.3 SE>NE > stop-ack\n    ff\n";
        let messages = parse(text).unwrap();
        assert_eq!(messages, [("noop".into(), vec![0x41, 0x4a, 0, 0, 1]), ("stop".into(), vec![0xff])]);
        assert_eq!(Target::Wire.seeds(&[1, 2]), [[7, 1, 2]]);
        assert_eq!(Target::Session.seeds(&[9])[1], [1, 1, 0, 1, 9, 11, 0, 12, 14]);
        assert!(parse("").is_err() && parse("    41\n").is_err() && parse("x\n    4\n").is_err());
    }

    #[test]
    fn the_messages_of_the_tree_are_read() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let messages = messages(root).unwrap();
        assert!(messages.len() > 70 && messages.iter().all(|(_, bytes)| bytes.starts_with(&[0x41, 0x4a])));
    }
}
