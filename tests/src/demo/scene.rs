//! What the view shows at one moment, in words and numbers, whichever way it is shown.

use std::{collections::VecDeque, time::Duration};

use super::{
    acts::ACTS,
    judge::Cause,
    record::{Findings, Record},
    status::Standing,
};
use crate::capture::WallTime;

/// One moment of the play.
#[derive(Debug)]
pub struct Scene<'a> {
    /// Since the play began.
    pub elapsed: Duration,
    /// The act's index; none when all have been played.
    pub act: Option<usize>,
    /// The present moment.
    pub now: WallTime,
    /// What has been seen so far.
    pub record: &'a Record,
    /// What it comes to.
    pub findings: &'a Findings,
    /// What the balancer says of each server.
    pub standings: &'a [Option<Standing>],
    /// What has happened, oldest first.
    pub said: &'a VecDeque<(Duration, String)>,
}

/// One server's line, or that of all of them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Row {
    /// `s1`, or `all`.
    pub name: String,
    /// As the balancer sees it; empty before it has joined.
    pub state: String,
    /// 0 to 100.
    pub health: Option<u64>,
    /// Health × capacity × slow start, 100 for a whole server.
    pub weight: Option<u64>,
    /// Per cent of the slot table.
    pub slots: Option<f64>,
    /// New connections per second.
    pub new: usize,
    /// Requests answered per second.
    pub requests: usize,
    /// Open downloads.
    pub downloads: usize,
    /// Open connections that ask again and again.
    pub repeating: usize,
    /// Flows on record at the balancer.
    pub records: Option<u64>,
    /// Requests answered so far.
    pub answered: u64,
    /// Requests failed so far.
    pub failed: u64,
}

/// A line of what must be so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Must {
    /// What is counted.
    pub what: &'static str,
    /// How many there are.
    pub count: usize,
}

impl Scene<'_> {
    /// The act's name and sentence.
    pub fn title(&self) -> (&'static str, &'static str) {
        self.act.map_or(("end", "All has been played; what is under way comes to its end"), |act| {
            (ACTS[act].name, ACTS[act].title)
        })
    }

    /// A row for each server, then one for all.
    pub fn rows(&self) -> Vec<Row> {
        let mut all = Row { name: "all".to_owned(), failed: self.record.failed_nowhere, ..Row::default() };
        let mut rows = Vec::new();
        for (server, tally) in self.record.servers.iter().enumerate() {
            let standing = self.standings.get(server).and_then(Option::as_ref);
            let row = Row {
                name: format!("s{}", server + 1),
                state: standing.map_or(String::new(), |standing| match (standing.state.as_str(), standing.reachable) {
                    ("up", false) => "no answer".to_owned(),
                    (state, _) => state.to_owned(),
                }),
                health: standing.and_then(|standing| standing.health),
                weight: standing.map(|standing| standing.weight / 1000),
                slots: standing.map(|standing| standing.slots_percent),
                new: tally.placed_per_second(self.now),
                requests: tally.answers_per_second(self.now),
                downloads: tally.open[1],
                repeating: tally.open[2],
                records: standing.map(|standing| standing.records),
                answered: tally.answered,
                failed: tally.failed,
            };
            all.new += row.new;
            all.requests += row.requests;
            all.downloads += row.downloads;
            all.repeating += row.repeating;
            all.records = Some(all.records.unwrap_or(0) + row.records.unwrap_or(0));
            all.answered += row.answered;
            all.failed += row.failed;
            rows.push(row);
        }
        rows.push(all);
        rows
    }

    /// What must be 0, so far.
    pub fn musts(&self) -> [Must; 2] {
        [
            Must { what: "established connections broken or moved", count: self.findings.harmed.len() },
            Must { what: "new connections on a stopped or lost server", count: self.findings.late.len() },
        ]
    }

    /// What a vanished server takes with it, which is allowed.
    pub fn allowed(&self) -> Option<String> {
        self.record.marks.iter().any(|mark| mark.cause == Cause::Vanished).then(|| {
            let (ended, dark) = (self.findings.went_with_server, self.findings.failed_in_the_dark);
            format!("allowed: {ended} broken with the server that vanished, {dark} never answered by it")
        })
    }
}

/// `00:07`, or `00:07.3`.
pub fn clock(elapsed: Duration, tenths: bool) -> String {
    let seconds = elapsed.as_secs();
    let tenth = if tenths { format!(".{}", elapsed.subsec_millis() / 100) } else { String::new() };
    format!("{:02}:{:02}{tenth}", seconds / 60, seconds % 60)
}

impl Row {
    /// The headings of [`Row::cells`].
    pub const HEAD: [&'static str; 12] =
        ["SERVER", "STATE", "HEALTH", "WEIGHT", "SLOTS", "NEW/S", "REQ/S", "DOWNL", "LONG", "REC", "DONE", "FAIL"];
    /// How wide they are.
    pub const WIDTHS: [u16; 12] = [6, 9, 6, 6, 6, 5, 5, 5, 4, 5, 6, 4];

    /// The row as text.
    pub fn cells(&self) -> [String; 12] {
        let number = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
        let all = self.name == "all";
        let or_blank = |text: String| if all { String::new() } else { text };
        [
            self.name.clone(),
            if self.state.is_empty() && !all { "-".to_owned() } else { self.state.clone() },
            or_blank(number(self.health)),
            or_blank(number(self.weight)),
            or_blank(self.slots.map_or_else(|| "-".to_owned(), |slots| format!("{slots:.1}%"))),
            self.new.to_string(),
            self.requests.to_string(),
            self.downloads.to_string(),
            self.repeating.to_string(),
            number(self.records),
            self.answered.to_string(),
            self.failed.to_string(),
        ]
    }

    /// A line of text; cells from the third on are aligned to the right.
    pub fn line(cells: &[String; 12]) -> String {
        let cell = |(at, text): (usize, &String)| {
            let width = usize::from(Self::WIDTHS[at]);
            if at < 2 { format!("{text:<width$}") } else { format!("{text:>width$}") }
        };
        cells.iter().enumerate().map(cell).collect::<Vec<_>>().join(" ").trim_end().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_fits_eighty_columns_and_its_heading() {
        let row = Row {
            name: "s1".to_owned(),
            state: "draining".to_owned(),
            health: Some(100),
            weight: Some(100),
            slots: Some(33.33),
            records: Some(12_345),
            answered: 123_456,
            ..Row::default()
        };
        let [head, line] = [Row::HEAD.map(str::to_owned), row.cells()].map(|cells| Row::line(&cells));
        assert!(head.len() <= 78 && line.len() <= 78, "{} {}", head.len(), line.len());
        assert_eq!(head.find("SLOTS").map(|at| at + 5), line.find("33.3%").map(|at| at + 5));
    }

    #[test]
    fn a_scene_counts_all_servers_together() {
        let mut record = Record::default();
        record.failed_nowhere = 2;
        let standings = [Some(Standing { state: "up".to_owned(), weight: 100_000, records: 7, ..Standing::default() })];
        let scene = Scene {
            elapsed: Duration::ZERO,
            act: None,
            now: Duration::ZERO,
            record: &record,
            findings: &Findings::default(),
            standings: &standings,
            said: &VecDeque::new(),
        };
        let rows = scene.rows();
        assert_eq!((rows[0].state.as_str(), rows[0].weight, rows[1].weight), ("no answer", Some(100), None));
        assert_eq!((rows[4].failed, rows[4].records), (2, Some(7)));
        assert_eq!(scene.allowed(), None);
    }

    #[test]
    fn clocks() {
        assert_eq!(clock(Duration::from_millis(67_890), false), "01:07");
        assert_eq!(clock(Duration::from_millis(7_390), true), "00:07.3");
    }
}
