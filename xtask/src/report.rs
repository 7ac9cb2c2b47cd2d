//! Reads what `cargo test` prints, and adds it up.

use std::{
    fmt::{self, Display, Formatter},
    time::Duration,
};

/// How many tests ended how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Held.
    pub passed: u64,
    /// Did not hold, did not end, or were never built.
    pub failed: u64,
    /// Were there, and did not run.
    pub skipped: u64,
}

impl Count {
    /// Those that were executed.
    pub fn executed(self) -> u64 {
        self.passed + self.failed
    }
}

impl std::ops::AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

/// The last line of `cargo xtask test`; scripts read it.
impl Display for Count {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

/// What one group of tests came to.
#[derive(Debug, Default)]
pub struct Group {
    /// The group's name.
    pub name: &'static str,
    /// Its sum.
    pub count: Count,
    /// Names of failed tests, and failures that are no test's.
    pub failures: Vec<String>,
    /// How long it took.
    pub took: Duration,
}

impl Group {
    /// Takes in one line of `cargo test`'s standard output.
    pub fn read_line(&mut self, line: &str) {
        if let Some(count) = summary(line) {
            self.count += count;
        } else if let Some(name) = failed_test(line) {
            self.failures.push(name.to_owned());
        }
    }

    /// Counts a failure that no test has reported, such as a crash.
    pub fn fail(&mut self, what: impl Into<String>) {
        self.count.failed += 1;
        self.failures.push(what.into());
    }
}

/// The table of all groups, the failures by name, and the total as the last line.
pub fn table(groups: &[Group]) -> String {
    let mut text = format!("\n{:<10} {:>8} {:>8} {:>8} {:>9}\n", "group", "passed", "failed", "skipped", "seconds");
    let mut total = Count::default();
    for group in groups {
        let Count { passed, failed, skipped } = group.count;
        let seconds = group.took.as_secs_f64();
        text += &format!("{:<10} {passed:>8} {failed:>8} {skipped:>8} {seconds:>9.1}\n", group.name);
        total += group.count;
    }
    for (group, failure) in groups.iter().flat_map(|group| group.failures.iter().map(move |failure| (group, failure))) {
        text += &format!("failed: {}: {failure}\n", group.name);
    }
    text + &format!("{total}\n")
}

/// `test result: ok. 5 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.00s`
fn summary(line: &str) -> Option<Count> {
    let (_, counts) = line.split_once("test result: ")?.1.split_once(". ")?;
    let mut count = Count::default();
    for part in counts.split("; ") {
        let (number, what) = part.split_once(' ')?;
        let Ok(number) = number.parse::<u64>() else { continue };
        match what {
            "passed" => count.passed = number,
            "failed" => count.failed = number,
            "ignored" => count.skipped = number,
            _ => {}
        }
    }
    Some(count)
}

/// `test module::name ... FAILED`
fn failed_test(line: &str) -> Option<&str> {
    line.strip_prefix("test ")?.strip_suffix(" ... FAILED")
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "
running 3 tests
test a::one ... ok
test a::two ... FAILED
test a::three ... ignored, no reason

test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.10s
test result: ok. 4 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    fn read(output: &str) -> Group {
        let mut group = Group { name: "unit", ..Group::default() };
        output.lines().for_each(|line| group.read_line(line));
        group
    }

    #[test]
    fn sums_every_program_of_a_group() {
        let group = read(OUTPUT);
        assert_eq!(group.count, Count { passed: 5, failed: 1, skipped: 1 });
        assert_eq!(group.failures, ["a::two"]);
    }

    #[test]
    fn the_total_is_the_last_line() {
        let mut groups = [read(OUTPUT), read("test result: ok. 2 passed; 0 failed; 0 ignored;")];
        assert_eq!(table(&groups).lines().last(), Some("7 passed, 1 failed, 1 skipped"));
        groups[0].count.skipped = 0;
        groups[1].fail("crashed");
        assert_eq!(table(&groups).lines().last(), Some("7 passed, 2 failed"));
        assert!(table(&groups).contains("failed: unit: a::two\n"));
    }

    #[test]
    fn what_a_test_prints_counts_for_nothing() {
        assert_eq!(read("5 passed, 5 failed\ntest result: hello\ntest it ... ok\n").count, Count::default());
    }
}
