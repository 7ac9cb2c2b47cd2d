//! The play: which act comes when, and what is done in it.

use std::time::Duration;

/// How many servers play.
pub const SERVERS: usize = 4;
/// The server whose health falls.
pub const UNWELL: usize = 1;
/// The server that drains.
pub const DRAINED: usize = 2;
/// The server whose agent is killed.
pub const ORPHANED: usize = 0;
/// The server that vanishes.
pub const VANISHED: usize = 3;
/// The health index that the unwell server falls to.
pub const LOW: u8 = 20;
/// Connections that are opened in the first act and live to the end: on servers that neither drain nor vanish, since
/// the others have not joined by then.
pub const LASTING: usize = 8;

/// One thing that is done. Numbers are servers: 0 is s1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Starts the agent, and waits until the balancer sends it new connections.
    Join(usize),
    /// Opens the load.
    Traffic,
    /// Opens so many connections that live to the end.
    Lasting(usize),
    /// Writes a health index where the agent looks for it.
    Health(usize, u8),
    /// SIGTERM to the agent, which sends STOP and leaves when its connections have ended.
    Drain(usize),
    /// SIGKILL to the agent; the web server goes on.
    KillAgent(usize),
    /// Link down, then SIGKILL to everything on the server.
    Vanish(usize),
    /// Link up and web server started; the agent joins by another step.
    Restore(usize),
}

/// A part of the play with a title of its own.
#[derive(Clone, Copy, Debug)]
pub struct Act {
    /// A few words.
    pub name: &'static str,
    /// A sentence that says what to look at.
    pub title: &'static str,
    /// In milliseconds.
    pub length: u64,
    /// Milliseconds from the act's beginning, and what is done then.
    pub steps: &'static [(u64, Step)],
}

/// All of it. What follows is the end of what is still under way, a few seconds.
pub const ACTS: [Act; 7] = [
    Act {
        name: "join",
        title: "Four servers join, one by one; nothing that is established moves",
        length: 9_000,
        steps: &[
            (0, Step::Join(0)),
            (100, Step::Traffic),
            (200, Step::Lasting(LASTING)),
            (2_000, Step::Join(1)),
            (2_200, Step::Lasting(LASTING)),
            (4_000, Step::Join(2)),
            (6_000, Step::Join(3)),
        ],
    },
    Act {
        name: "health",
        title: "The health of s2 falls to 20: so does its share of new connections",
        length: 7_000,
        steps: &[(0, Step::Health(UNWELL, LOW))],
    },
    Act {
        name: "drain",
        title: "s3 stops: no new connections, the others end in peace, then it leaves",
        length: 9_000,
        steps: &[(0, Step::Health(UNWELL, 100)), (500, Step::Drain(DRAINED))],
    },
    Act {
        name: "kill",
        title: "The agent of s1 is killed; its web server lives, its downloads finish",
        length: 8_000,
        steps: &[(0, Step::KillAgent(ORPHANED))],
    },
    Act {
        name: "return",
        title: "The agent of s1 comes back, and so does s3",
        length: 5_000,
        steps: &[(0, Step::Join(ORPHANED)), (1_500, Step::Join(DRAINED))],
    },
    Act {
        name: "vanish",
        title: "s4 vanishes: link down, all killed; only its own connections end",
        length: 9_000,
        steps: &[(0, Step::Vanish(VANISHED))],
    },
    Act {
        name: "restore",
        title: "s4 comes back",
        length: 5_000,
        steps: &[(0, Step::Restore(VANISHED)), (300, Step::Join(VANISHED))],
    },
];

/// How long all acts take together.
pub fn length() -> Duration {
    Duration::from_millis(ACTS.iter().map(|act| act.length).sum())
}

/// The index in [`ACTS`] of the act that plays at this time; none when all have been played.
pub fn act_at(elapsed: Duration) -> Option<usize> {
    let mut end = 0;
    ACTS.iter().position(|act| {
        end += act.length;
        elapsed < Duration::from_millis(end)
    })
}

/// Every step with its time from the beginning of the play, in the order of time.
pub fn script() -> Vec<(Duration, Step)> {
    let mut begin = 0;
    let mut script = Vec::new();
    for act in &ACTS {
        script.extend(act.steps.iter().map(|(after, step)| (Duration::from_millis(begin + after), *step)));
        begin += act.length;
    }
    script
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(step: Step) -> usize {
        let found = script().iter().position(|(_, other)| *other == step);
        found.unwrap_or_else(|| panic!("{step:?} is played"))
    }

    #[test]
    fn everything_is_played_in_its_order_and_within_a_minute() {
        let order = [
            Step::Join(0),
            Step::Traffic,
            Step::Join(1),
            Step::Join(2),
            Step::Join(3),
            Step::Health(UNWELL, LOW),
            Step::Drain(DRAINED),
            Step::KillAgent(ORPHANED),
            Step::Vanish(VANISHED),
            Step::Restore(VANISHED),
        ];
        assert!(order.map(position).is_sorted());
        assert!(length() <= Duration::from_secs(54), "with the end of what is under way: about a minute");
        let times: Vec<_> = script().iter().map(|(at, _)| *at).collect();
        assert!(times.is_sorted() && times.last().is_some_and(|last| *last < length()));
    }

    #[test]
    fn who_goes_comes_back() {
        let script = script();
        for (gone, server) in
            [(Step::Drain(DRAINED), DRAINED), (Step::KillAgent(ORPHANED), ORPHANED), (Step::Vanish(VANISHED), VANISHED)]
        {
            let after = &script[position(gone)..];
            assert!(after.iter().any(|(_, step)| *step == Step::Join(server)), "{gone:?}");
        }
    }

    #[test]
    fn lasting_connections_are_opened_before_those_join_that_drain_or_vanish() {
        let last = script().iter().rposition(|(_, step)| matches!(step, Step::Lasting(_)));
        assert!(last.is_some_and(|last| last < position(Step::Join(DRAINED)) && last < position(Step::Join(VANISHED))));
    }

    #[test]
    fn acts_follow_each_other() {
        assert_eq!(act_at(Duration::ZERO), Some(0));
        assert_eq!(act_at(Duration::from_millis(ACTS[0].length)), Some(1));
        assert_eq!(act_at(length() - Duration::from_millis(1)), Some(ACTS.len() - 1));
        assert_eq!(act_at(length()), None);
    }
}
