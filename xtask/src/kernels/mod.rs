//! `cargo xtask test --kernels`: the kernel program on other kernels than the one that runs.
//!
//! Debian's kernels are downloaded by name, and boot under QEMU (emulated, which works everywhere) with an initial RAM disk
//! of the test programs that matter: one loads the programs as daemon and agent do and tells how many instructions the verifier
//! followed; one runs the described packets; one has a server whose own GRE device takes what `necp ne` sends. The running
//! kernel does the same without a virtual machine, but for the last, which it may have no device for.
//!
//! To run another test in the guests, name its program in [`PROGRAMS`], and what it needs in [`guest`]: modules of the
//! kernel's package, programs of this host.

mod fetch;
mod guest;
mod image;

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    host::{self, Host, say},
    report::{Count, Group},
    setup,
};

/// Debian's names of kernels, the oldest first: what it offers by default, and newer ones beside it.
const KERNELS: [&str; 2] = ["linux-image-cloud-amd64", "linux-image-6.12-cloud-amd64"];

/// The test programs of `tests`, and their arguments. The random frames take minutes in an emulated machine.
const PROGRAMS: [(&str, &[&str]); 3] =
    [("packet_kernel", &[]), ("packets", &["--skip", "random_frames"]), ("gre_device", &[])];

/// The one of them that only a guest is known to have everything for: on the running kernel it counts as skipped.
const IN_GUESTS: &str = "gre_device";

/// A line of a test program about one program that the kernel has taken.
const VERIFIED: &str = "verified: ";

/// What came of one kernel.
#[derive(Debug, Default)]
struct Outcome {
    kernel: String,
    group: Group,
    /// Lines of [`VERIFIED`].
    verified: Vec<String>,
    /// Test programs that came to their end.
    ended: usize,
    /// What else the guest had to say.
    notes: Vec<String>,
}

impl Outcome {
    fn new(kernel: impl Into<String>) -> Self {
        Self { kernel: kernel.into(), ..Self::default() }
    }

    /// Takes in a line of a test program, or of the guest.
    fn read_line(&mut self, line: &str) {
        self.group.read_line(line);
        // After `test NAME ... ` on the same line, if the test has a thread to itself.
        if let Some((_, what)) = line.split_once(VERIFIED)
            && !self.verified.iter().any(|known| known == what)
        {
            self.verified.push(what.into());
        }
        match line.strip_prefix(guest::MARK).map(|rest| rest.split_once(' ').unwrap_or((rest, ""))) {
            Some(("kernel", release)) => self.kernel = release.into(),
            Some(("ended", status)) => {
                self.ended += 1;
                if !status.ends_with(" 0") && self.group.count.failed == 0 {
                    self.group.fail(format!("test program and status: {status}"));
                }
            }
            Some(("note", note)) => self.notes.push(note.into()),
            Some(("failed", what)) => self.group.fail(what),
            _ => {}
        }
    }

    /// Whoever has not shown it has not passed.
    fn hold_to_account(&mut self) {
        if self.ended < PROGRAMS.len() {
            self.group.fail(format!("only {} of {} test programs came to their end", self.ended, PROGRAMS.len()));
        }
        if self.verified.is_empty() {
            self.group.fail("no program was verified");
        }
    }
}

/// Runs everything; the total is the last line.
pub fn test(host: &Host) -> Result<ExitCode> {
    host.require_root("loading a program")?;
    setup::build(host)?;
    setup::traffic(host)?;
    setup::guests(host)?;
    let programs = build(host)?;
    let mut outcomes = vec![running(host, &programs)?];
    let kernels: Vec<_> = KERNELS.map(|package| (package, fetch::kernel(host, package))).into_iter().collect();
    // An emulated machine uses one CPU, so they run side by side.
    std::thread::scope(|scope| {
        let guest = |(package, kernel)| {
            let programs = &programs;
            scope.spawn(move || match kernel {
                Ok(kernel) => emulated(host, &kernel, programs),
                Err(error) => Ok(not_to_be_had(package, &error)),
            })
        };
        let guests: Vec<_> = kernels.into_iter().map(guest).collect();
        guests.into_iter().try_for_each(|guest| {
            outcomes.push(guest.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
            Ok::<_, anyhow::Error>(())
        })
    })?;
    if outcomes.iter().skip(1).all(|outcome| outcome.group.count.skipped > 0)
        && let Some(outcome) = outcomes.last_mut()
    {
        outcome.group.fail("no kernel but the running one could be had");
    }
    print!("{}", table(&outcomes));
    std::io::stdout().flush()?;
    let failed = outcomes.iter().any(|outcome| outcome.group.count.failed > 0);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn not_to_be_had(package: &str, error: &anyhow::Error) -> Outcome {
    let mut outcome = Outcome::new(package);
    outcome.group.count.skipped = 1;
    outcome.notes.push(format!("skipped: {error:#}"));
    outcome
}

/// Builds the test programs, and `necp` for them; their files, in the order of [`PROGRAMS`].
fn build(host: &Host) -> Result<Vec<PathBuf>> {
    say("building the tests");
    let mut necp = host.cargo(["build", "--quiet", "--package", "necp-user", "--bin", "necp"]);
    host::execute(&mut necp, "see the compiler's messages above")?;
    let mut command = host.cargo(["test", "--workspace", "--no-run"]);
    command.args(PROGRAMS.iter().flat_map(|(name, _)| ["--test", *name]));
    let output = command.stdout(Stdio::null()).stderr(Stdio::piped()).output().context("cargo did not start")?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "the tests do not build:\n{text}");
    let file = |name: &str| {
        executable(&text, name)
            .map(|file| host.root.join(file))
            .with_context(|| format!("cargo built no test `{name}`"))
    };
    PROGRAMS.iter().map(|(name, _)| file(name)).collect()
}

/// The file that cargo's output names: `  Executable tests/packets/main.rs (target/debug/deps/packets-95e0396d26ba1151)`.
fn executable<'a>(output: &'a str, name: &str) -> Option<&'a str> {
    let file = |line: &'a str| line.trim().strip_prefix("Executable ")?.rsplit_once('(')?.1.strip_suffix(')');
    let has_name = |path: &&str| {
        Path::new(path)
            .file_name()
            .and_then(|file| file.to_str()?.rsplit_once('-'))
            .is_some_and(|(stem, _)| stem == name)
    };
    output.lines().filter_map(file).find(has_name)
}

fn running(host: &Host, programs: &[PathBuf]) -> Result<Outcome> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("there is no /proc")?;
    say(format_args!("the running kernel, {}", release.trim()));
    let started = Instant::now();
    let mut outcome = Outcome::new(format!("{} (running)", release.trim()));
    for (file, (name, args)) in programs.iter().zip(PROGRAMS) {
        if name == IN_GUESTS {
            outcome.group.count.skipped += 1;
            outcome.ended += 1;
            outcome.notes.push(format!("skipped: {name}, which is for the guests"));
            continue;
        }
        let mut command = host.command(file);
        command.current_dir(host.root.join("tests")).args(args).args(guest::TEST_ARGS);
        let status = follow(&mut command, &mut outcome)?;
        outcome.read_line(&format!("{}ended {name} {}", guest::MARK, status.code().unwrap_or(-1)));
    }
    outcome.group.took = started.elapsed();
    outcome.hold_to_account();
    Ok(outcome)
}

fn emulated(host: &Host, kernel: &fetch::Kernel, programs: &[PathBuf]) -> Result<Outcome> {
    say(format_args!("{} in QEMU", kernel.release));
    let started = Instant::now();
    let mut outcome = Outcome::new(&kernel.release);
    let mut qemu = guest::boot(host, kernel, programs)?;
    follow(&mut qemu, &mut outcome)?;
    outcome.group.took = started.elapsed();
    outcome.hold_to_account();
    Ok(outcome)
}

/// Shows each line as it comes, with the kernel that it is of, and takes it in.
fn follow(command: &mut Command, outcome: &mut Outcome) -> Result<std::process::ExitStatus> {
    host::lines(command, |line| {
        println!("{}: {line}", outcome.kernel);
        outcome.read_line(line);
    })
}

/// A row for each kernel, what failed, and the total.
fn table(outcomes: &[Outcome]) -> String {
    let width = outcomes.iter().map(|outcome| outcome.kernel.len()).max().unwrap_or_default().max("kernel".len());
    let mut text =
        format!("\n{:<width$} {:>8} {:>8} {:>8} {:>9}\n", "kernel", "passed", "failed", "skipped", "seconds");
    let mut total = Count::default();
    for outcome in outcomes {
        let Count { passed, failed, skipped } = outcome.group.count;
        let seconds = Duration::as_secs_f64(&outcome.group.took);
        text += &format!("{:<width$} {passed:>8} {failed:>8} {skipped:>8} {seconds:>9.1}\n", outcome.kernel);
        total += outcome.group.count;
    }
    for outcome in outcomes {
        let kernel = &outcome.kernel;
        outcome.verified.iter().for_each(|line| text += &format!("verified: {kernel}: {line}\n"));
        outcome.notes.iter().for_each(|note| text += &format!("{kernel}: {note}\n"));
        outcome.group.failures.iter().for_each(|failure| text += &format!("failed: {kernel}: {failure}\n"));
    }
    text + &format!("{total}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERIAL: &str = "\
SeaBIOS
guest: kernel 6.1.0-56-cloud-amd64
guest: note gre device: ok
test a ... verified: necp: 93 instructions
ok
test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s
guest: ended packet_kernel 0
test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out; finished in 1.00s
guest: ended packets 0
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s
guest: ended gre_device 0
";

    fn read(serial: &str) -> Outcome {
        let mut outcome = Outcome::new("?");
        serial.lines().for_each(|line| outcome.read_line(line));
        outcome.hold_to_account();
        outcome
    }

    #[test]
    fn a_guest_that_shows_everything_passes() {
        let outcome = read(SERIAL);
        assert_eq!(outcome.group.count, Count { passed: 7, failed: 0, skipped: 0 });
        assert_eq!((outcome.kernel.as_str(), outcome.verified.len()), ("6.1.0-56-cloud-amd64", 1));
        let table = table(&[outcome]);
        assert!(table.contains("verified: 6.1.0-56-cloud-amd64: necp: 93 instructions\n"), "{table}");
        assert_eq!(table.lines().last(), Some("7 passed, 0 failed"));
    }

    #[test]
    fn a_guest_that_says_nothing_of_something_fails() {
        assert!(read("").group.count.failed >= 2);
        let panicked = SERIAL.split("guest: ended packets").next().unwrap();
        assert_eq!(read(panicked).group.count.failed, 1);
        assert_eq!(read(&SERIAL.replace("ended packets 0", "ended packets 101")).group.count.failed, 1);
        assert_eq!(read(&SERIAL.replace("verified: ", "")).group.count.failed, 1);
        assert_eq!(read(&SERIAL.replace("note gre device: ok", "failed no module ip_gre")).group.count.failed, 1);
    }

    #[test]
    fn a_program_is_found_by_its_name() {
        let output = "  Executable tests/packets/main.rs (target/debug/deps/packets-95e0)\n  \
                      Executable tests/packet_kernel.rs (target/debug/deps/packet_kernel-1)\n";
        assert_eq!(executable(output, "packets"), Some("target/debug/deps/packets-95e0"));
        assert_eq!(executable(output, "packet_kernel"), Some("target/debug/deps/packet_kernel-1"));
        assert_eq!(executable(output, "packet"), None);
    }
}
