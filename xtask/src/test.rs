//! `cargo xtask test`: every test of the workspace in four groups, and a total.
//!
//! A test program of `tests/tests` belongs to a group by its file's name: `property*` and `packet*` to theirs, every
//! other to `netns`, whose tests run one at a time as root. So a new file is never left out.

use std::{
    fs,
    io::Write as _,
    process::{Command, ExitCode},
    time::Instant,
};

use anyhow::Result;
use clap::{Args, ValueEnum};

use crate::{
    host::{self, Host, say},
    kernels,
    report::{Group, table},
    setup,
};

/// Arguments of `cargo xtask test`.
#[derive(Args)]
pub struct TestArgs {
    /// Run only tests whose name holds this
    filter: Option<String>,
    /// Run only these groups
    #[arg(long, value_enum, value_name = "GROUP", value_delimiter = ',')]
    only: Vec<Kind>,
    /// Instead: the kernel program on Debian's kernels in QEMU, and on the running one (root)
    #[arg(long, conflicts_with_all = ["filter", "only", "rest"])]
    kernels: bool,
    /// Further arguments for the test programs, e.g. `-- --nocapture`
    #[arg(last = true, value_name = "ARG")]
    rest: Vec<String>,
}

/// A group of tests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Unit tests and examples in the documentation
    Unit,
    /// Model and property tests on the host
    Property,
    /// The kernel program on single packets through BPF_PROG_TEST_RUN (root)
    Packet,
    /// Real traffic in network namespaces, one test at a time (root)
    Netns,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Unit, Self::Property, Self::Packet, Self::Netns];

    fn name(self) -> &'static str {
        match self {
            Self::Unit => "unit",
            Self::Property => "property",
            Self::Packet => "packet",
            Self::Netns => "netns",
        }
    }

    fn needs_root(self) -> bool {
        matches!(self, Self::Packet | Self::Netns)
    }

    fn of_program(name: &str) -> Self {
        match name {
            _ if name.starts_with("property") => Self::Property,
            _ if name.starts_with("packet") => Self::Packet,
            _ => Self::Netns,
        }
    }
}

/// Runs the groups; the total is the last line on standard output, and nothing follows it.
pub fn test(host: &Host, args: &TestArgs) -> Result<ExitCode> {
    if args.kernels {
        return kernels::test(host);
    }
    let kinds: Vec<_> = Kind::ALL.into_iter().filter(|kind| args.only.is_empty() || args.only.contains(kind)).collect();
    if kinds.iter().any(|kind| kind.needs_root()) {
        host.require_root("this group of tests (without root: `cargo xtask test --only unit,property`)")?;
    }
    setup::build(host)?;
    if kinds.iter().any(|kind| kind.needs_root()) {
        setup::traffic(host)?;
    }
    let programs = test_programs(host)?;
    let mut groups = Vec::new();
    if let Err(error) = build(host) {
        let mut group = Group { name: "build", ..Group::default() };
        group.fail(format!("{error:#}"));
        groups.push(group);
    } else {
        for (at, kind) in kinds.iter().enumerate() {
            say(format_args!("{} tests ({} of {})", kind.name(), at + 1, kinds.len()));
            groups.push(run_group(host, *kind, &programs, args)?);
        }
        hold_to_account(&mut groups, args.filter.as_deref());
    }
    print!("{}", table(&groups));
    std::io::stdout().flush()?;
    let failed = groups.iter().any(|group| group.count.failed > 0);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A group that executed nothing has shown nothing.
fn hold_to_account(groups: &mut [Group], filter: Option<&str>) {
    match filter {
        None => {
            for group in groups.iter_mut().filter(|group| group.count.executed() == 0) {
                group.fail("no test was executed");
            }
        }
        Some(filter) if groups.iter().all(|group| group.count.executed() == 0) => {
            if let Some(group) = groups.first_mut() {
                group.fail(format!("no test's name holds `{filter}`"));
            }
        }
        Some(_) => {}
    }
}

fn build(host: &Host) -> Result<()> {
    say("building the `necp` binary");
    let advice = "the compiler's message stands above";
    // Apart from the tests, which switch on what the shipped binary must not have.
    host::execute(&mut host.cargo(["build", "--quiet", "--package", "necp-user", "--bin", "necp"]), advice)?;
    say("building the tests");
    host::execute(&mut host.cargo(["test", "--quiet", "--workspace", "--no-run"]), advice)
}

fn run_group(host: &Host, kind: Kind, programs: &[String], args: &TestArgs) -> Result<Group> {
    let started = Instant::now();
    let mut group = Group { name: kind.name(), ..Group::default() };
    if kind == Kind::Unit {
        run_tests(host, &mut group, &["--lib", "--bins"], args)?;
        run_tests(host, &mut group, &["--doc"], args)?;
    } else {
        let chosen = programs.iter().filter(|program| Kind::of_program(program) == kind);
        let targets: Vec<_> = chosen.flat_map(|program| ["--test", program.as_str()]).collect();
        if !targets.is_empty() {
            run_tests(host, &mut group, &targets, args)?;
        }
    }
    group.took = started.elapsed();
    Ok(group)
}

fn run_tests(host: &Host, group: &mut Group, targets: &[&str], args: &TestArgs) -> Result<()> {
    // The whole workspace each time: another choice of packages would switch features, and compile everything anew.
    let mut command = host.cargo(["test", "--workspace", "--no-fail-fast"]);
    command.args(targets).arg("--").args(&args.filter).arg("--format=pretty");
    if group.name == Kind::Netns.name() {
        command.arg("--test-threads=1");
    }
    command.args(&args.rest).env("NECP_BIN", host.binary("debug", "necp"));
    let failed_before = group.count.failed;
    let success = follow(&mut command, group)?;
    if !success && group.count.failed == failed_before {
        group.fail(format!("a test program of {} did not come to its end", targets.join(" ")));
    }
    Ok(())
}

/// Shows each line as it comes, and counts.
fn follow(command: &mut Command, group: &mut Group) -> Result<bool> {
    let status = host::lines(command, |line| {
        println!("{line}");
        group.read_line(line);
    })?;
    Ok(status.success())
}

fn test_programs(host: &Host) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for package in ["necp-ebpf", "necp-user", "tests"] {
        let Ok(entries) = fs::read_dir(host.root.join(package).join("tests")) else { continue };
        for entry in entries {
            let path = entry?.path();
            let program = path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").exists();
            if let Some(name) = path.file_stem().filter(|_| program) {
                names.push(name.to_string_lossy().into_owned());
            }
        }
    }
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Count;

    fn group(passed: u64) -> Group {
        Group { count: Count { passed, ..Count::default() }, ..Group::default() }
    }

    #[test]
    fn every_test_program_belongs_to_a_group() {
        assert_eq!(Kind::of_program("property_steer"), Kind::Property);
        assert_eq!(Kind::of_program("packet"), Kind::Packet);
        assert_eq!(Kind::of_program("anything"), Kind::Netns);
    }

    #[test]
    fn a_group_without_tests_fails() {
        let mut groups = [group(3), group(0)];
        hold_to_account(&mut groups, None);
        assert_eq!([groups[0].count.failed, groups[1].count.failed], [0, 1]);
    }

    #[test]
    fn a_filter_may_pass_groups_by_but_not_all() {
        let mut groups = [group(3), group(0)];
        hold_to_account(&mut groups, Some("x"));
        assert_eq!([groups[0].count.failed, groups[1].count.failed], [0, 0]);
        let mut groups = [group(0), group(0)];
        hold_to_account(&mut groups, Some("x"));
        assert_eq!(groups[0].count.failed, 1);
    }
}
