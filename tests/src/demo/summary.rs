//! What is said at the end, and whether every "must" holds.

use std::{fmt::Write as _, time::Duration};

use super::{
    acts::{ORPHANED, UNWELL},
    judge::{self, Cause, Ended, Outage},
    record::{Findings, Record},
};
use crate::capture::WallTime;

/// At most so many cases of a kind are told one by one.
const TOLD: usize = 8;

/// The end of the play.
#[derive(Debug)]
pub struct Summary<'a> {
    /// What was seen.
    pub record: &'a Record,
    /// What it comes to.
    pub findings: Findings,
    /// Frames that the capture has missed.
    pub missed: u32,
    /// Whether everything under way came to its end.
    pub quiet: bool,
    /// When the health of the unwell server was changed: down, and up again.
    pub unwell: Option<(WallTime, WallTime)>,
    /// How long it all took.
    pub took: Duration,
}

/// A line that decides the exit code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Whether it is as it must be.
    pub holds: bool,
    /// What it says.
    pub text: String,
}

impl Summary<'_> {
    /// The "must" lines.
    pub fn musts(&self) -> Vec<Line> {
        let zero = |count: usize, what: &str| Line { holds: count == 0, text: format!("{count} {what}") };
        let (under_way, whole) = self.downloads_of_the_orphan();
        let seen = self.findings.outages.len();
        let marks = self.record.marks.len();
        let mut lines = vec![
            zero(self.findings.harmed.len(), "established connections broken or moved while their server was there"),
            zero(self.findings.late.len(), "new connections on a stopped or lost server, first SYN over 10 ms late"),
            Line {
                holds: under_way > 0 && whole == under_way,
                text: format!(
                    "{whole} of {under_way} downloads on s{} outlived its agent, checksums right",
                    ORPHANED + 1
                ),
            },
            Line {
                holds: marks == 3 && seen == marks && self.missed == 0,
                text: format!("{seen} of 3 departures were seen on the wire, {} frames missed", self.missed),
            },
        ];
        if !self.quiet {
            lines.push(Line { holds: false, text: "connections hung to the end, and were cut off".to_owned() });
        }
        lines
    }

    /// Does every "must" hold?
    pub fn holds(&self) -> bool {
        self.musts().iter().all(|line| line.holds)
    }

    /// All of it as text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "Summary after {:.0} s", self.took.as_secs_f64())?;
        self.requests(text)?;
        self.connections(text)?;
        writeln!(text)?;
        for outage in &self.findings.outages {
            writeln!(text, "  {}", self.departure(outage))?;
        }
        for mark in &self.findings.unseen {
            writeln!(text, "  s{}: {:?}, but neither STOP_ACK nor loss was seen", mark.server + 1, mark.cause)?;
        }
        writeln!(text, "\n  what must hold: none, none, all, all")?;
        for line in self.musts() {
            writeln!(text, "  {}  {}", if line.holds { "ok    " } else { "FAILED" }, line.text)?;
        }
        self.cases(text)
    }

    fn requests(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n  {:<8}{:>9}{:>10}{:>8}{:>13}", "requests", "sent", "answered", "failed", "connections")?;
        let attempts = self.record.attempts.all();
        let mut line = |name: &str, answered: u64, failed: u64, connections: usize| {
            writeln!(text, "  {name:<8}{:>9}{answered:>10}{failed:>8}{connections:>13}", answered + failed)
        };
        for (server, tally) in self.record.servers.iter().enumerate() {
            let placed = attempts.iter().filter(|attempt| attempt.placed.first().is_some_and(|(_, on)| *on == server));
            line(&format!("s{}", server + 1), tally.answered, tally.failed, placed.count())?;
        }
        let nowhere = attempts.iter().filter(|attempt| attempt.placed.is_empty()).count();
        if self.record.failed_nowhere > 0 || nowhere > 0 {
            line("nowhere", 0, self.record.failed_nowhere, nowhere)?;
        }
        line("all", self.record.answered(), self.record.failed(), attempts.len())
    }

    fn connections(&self, text: &mut String) -> std::fmt::Result {
        let whole = self.record.ends.iter().filter(|end| end.failure.is_none()).count();
        writeln!(
            text,
            "\n  connections: {whole} whole, {} broken with the server that vanished,\n  {} never answered by it, {} refused",
            self.findings.went_with_server,
            self.findings.failed_in_the_dark,
            self.findings.refused.len()
        )?;
        if let Some((down, up)) = self.unwell {
            let attempts = self.record.attempts.all();
            let second = Duration::from_secs(1);
            let before = judge::share(attempts, UNWELL, down.saturating_sub(second * 2), down);
            // The health is asked for once a second.
            let during = judge::share(attempts, UNWELL, down + second * 2, up);
            if let (Some(before), Some(during)) = (before, during) {
                let (before, during) = (before * 100.0, during * 100.0);
                let name = UNWELL + 1;
                writeln!(
                    text,
                    "  health of s{name} down: {before:.0} % of the new connections before, {during:.0} % then"
                )?;
            }
        }
        Ok(())
    }

    fn departure(&self, outage: &Outage) -> String {
        let attempts = self.record.attempts.all();
        let name = outage.server + 1;
        let elsewhere = |since| {
            judge::first_elsewhere(attempts, outage, since).map_or_else(|| "none seen".to_owned(), milliseconds)
        };
        let known = milliseconds(outage.began.saturating_sub(outage.done));
        let from_then = elsewhere(outage.began);
        match outage.cause {
            Cause::Stopped => format!(
                "s{name} stops: STOP_ACK {known} after SIGTERM;\n    first SYN that goes elsewhere {from_then} after STOP_ACK"
            ),
            Cause::AgentKilled => format!(
                "s{name}'s agent is killed: session closed {known} after SIGKILL;\n    first SYN that goes elsewhere \
                 {from_then} after the loss"
            ),
            Cause::Vanished => format!(
                "s{name} vanishes: declared lost {known} after its link went down;\n    first SYN that goes elsewhere \
                 {from_then} after the loss, {} after the link went down;\n    {} new connections were sent to it in the \
                 dark between",
                elsewhere(outage.done),
                judge::in_the_dark(attempts, outage)
            ),
        }
    }

    fn cases(&self, text: &mut String) -> std::fmt::Result {
        let start = self.record.marks.first().map(|mark| mark.at);
        let end = |end: &Ended| {
            let server = end.server.map_or_else(|| "no server".to_owned(), |server| format!("s{}", server + 1));
            let failure = end.failure.as_ref().map(ToString::to_string).unwrap_or_default();
            let client = end.client.map(|client| client.to_string()).unwrap_or_default();
            let lasted = end.ended.saturating_sub(end.began).as_secs_f64();
            let began = start.map_or(0.0, |start| end.began.as_secs_f64() - start.as_secs_f64());
            format!(
                "    {:?} from {client} to {server}: {failure} after {lasted:.2} s; begun {began:+.2} s from the first \
                 departure",
                end.kind
            )
        };
        for (what, ends) in [("harmed", &self.findings.harmed), ("refused", &self.findings.refused)] {
            if !ends.is_empty() {
                writeln!(text, "\n  {what}:")?;
            }
            ends.iter().take(TOLD).try_for_each(|one| writeln!(text, "{}", end(one)))?;
        }
        if !self.findings.late.is_empty() {
            writeln!(text, "\n  placed too late:")?;
        }
        self.findings.late.iter().take(TOLD).try_for_each(|late| {
            let after = milliseconds(late.after);
            writeln!(text, "    {} on s{}, first SYN {after} after it was known", late.client, late.server + 1)
        })
    }

    fn downloads_of_the_orphan(&self) -> (usize, usize) {
        let killed = self.record.marks.iter().find(|mark| mark.cause == Cause::AgentKilled);
        killed.map_or((0, 0), |mark| judge::downloads_across(&self.record.ends, mark.server, mark.at))
    }
}

fn milliseconds(time: Duration) -> String {
    let millis = time.as_secs_f64() * 1000.0;
    if millis < 100.0 { format!("{millis:.1} ms") } else { format!("{millis:.0} ms") }
}

#[cfg(test)]
#[path = "summary_tests.rs"]
mod tests;
