//! The tables of the agent's commands.

use std::fmt::Write as _;

use crate::daemon::se::protocol::{AgentStatus, HealthStatus, NeAnswer, Outcome};
use crate::daemon::status::render::{duration, finish, table};

/// What each network element answered.
pub fn answers(answers: &[NeAnswer]) -> String {
    let mut table = table(&["NETWORK ELEMENT", "RESULT"]);
    for answer in answers {
        table.add_row([answer.ne.clone(), result(answer)]);
    }
    let mut text = String::new();
    finish(table, 2, &mut text);
    text
}

/// The exceptions at each network element.
pub fn listing(answers: &[NeAnswer]) -> String {
    let mut table = table(&["NETWORK ELEMENT", "INSTALLER", "SCOPE", "SRC", "DST", "PORT"]);
    let mut notes = String::new();
    for answer in answers {
        let Some(entries) = &answer.entries else {
            let why = answer.why.as_deref().unwrap_or("no answer");
            let away = if answer.result == Outcome::Away { "away, " } else { "" };
            let _ = writeln!(notes, "{}: {away}{why}", answer.ne);
            continue;
        };
        for entry in entries {
            table.add_row([
                answer.ne.clone(),
                entry.installer.to_string(),
                entry.scope.to_string(),
                entry.src.to_string(),
                entry.dst.to_string(),
                entry.port.to_string(),
            ]);
        }
        if entries.is_empty() {
            let _ = writeln!(notes, "{}: none", answer.ne);
        } else if answer.more {
            let _ = writeln!(notes, "{}: more than {}; name --src, --dst or --installer", answer.ne, entries.len());
        }
    }
    let mut text = String::new();
    if !table.is_empty() {
        finish(table, 6, &mut text);
    }
    text + &notes
}

/// Where the Health Index comes from.
pub fn health(health: &HealthStatus) -> String {
    if health.overridden {
        format!("health {} (set by `necp health`; {} says {})\n", health.index, health.source, health.source_index)
    } else {
        format!("health {} ({})\n", health.index, health.source)
    }
}

/// All about an agent.
pub fn status(status: &AgentStatus) -> String {
    let services = if status.services.is_empty() { "nothing".into() } else { status.services.join(" ") };
    let mut text = format!(
        "necp {} agent pid {} up {}, {} {services}",
        status.version,
        status.pid,
        duration(status.uptime_seconds),
        if status.serving { "serving" } else { "drained:" },
    );
    match status.connections {
        Some(1) => text.push_str(", 1 connection\n"),
        Some(count) => _ = writeln!(text, ", {count} connections"),
        None => text.push('\n'),
    }
    text.push_str(&health(&status.health));
    let count = status.exceptions;
    let _ = writeln!(text, "exceptions {} local, {} global\n", count.local, count.global);
    text.push_str(&nes(status));
    for ne in &status.nes {
        if let Some(why) = &ne.why {
            let _ = writeln!(text, "{}: {why}", ne.ne);
        }
    }
    text
}

fn nes(status: &AgentStatus) -> String {
    let mut table = table(&["NETWORK ELEMENT", "STATE", "FOR", "KNOWN AS", "STARTED", "REFUSED", "ITS HEALTH"]);
    let list = |services: &[String]| if services.is_empty() { "-".into() } else { services.join(" ") };
    for ne in &status.nes {
        table.add_row([
            ne.ne.clone(),
            ne.state.clone(),
            duration(ne.since_seconds),
            ne.address.map_or_else(|| "-".into(), |address| address.to_string()),
            list(&ne.started),
            list(&ne.refused),
            ne.health.map_or_else(|| "-".into(), |health| health.to_string()),
        ]);
    }
    let mut text = String::new();
    finish(table, 6, &mut text);
    text
}

fn result(answer: &NeAnswer) -> String {
    let why = answer.why.as_deref().unwrap_or_default();
    match answer.result {
        Outcome::Accepted => "accepted".into(),
        Outcome::OtherFamily => "not asked: that session is of the other address family".into(),
        Outcome::Away => format!("away, will be told when it is back ({why})"),
        Outcome::Refused | Outcome::Lost | Outcome::Timeout => why.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::se::protocol::{Entry, ExceptionCount, NeStatus};

    fn answer(ne: &str, result: Outcome, why: Option<&str>) -> NeAnswer {
        NeAnswer { ne: ne.into(), result, why: why.map(Into::into), entries: None, more: false }
    }

    #[test]
    fn answers_line_up() {
        let told = [
            answer("10.0.0.1:3262", Outcome::Accepted, None),
            answer("ne2.example.net:3262", Outcome::Away, Some("cannot connect: refused")),
            answer("10.0.0.3:3262", Outcome::Refused, Some("refused any -> 198.51.100.7/32 tcp/80")),
            answer("[2001:db8::1]:3262", Outcome::OtherFamily, None),
        ];
        let expected = "  \
  NETWORK ELEMENT       RESULT
  10.0.0.1:3262         accepted
  ne2.example.net:3262  away, will be told when it is back (cannot connect: refused)
  10.0.0.3:3262         refused any -> 198.51.100.7/32 tcp/80
  [2001:db8::1]:3262    not asked: that session is of the other address family
";
        assert_eq!(answers(&told), expected);
    }

    #[test]
    fn exceptions_line_up_and_none_is_said() {
        let entry = |src: &str, scope: &str| Entry {
            installer: [10, 0, 0, 11].into(),
            scope: scope.parse().expect(scope),
            src: src.parse().expect(src),
            dst: "198.51.100.7".parse().expect("an address"),
            port: "tcp/80".parse().expect("a port"),
        };
        let entries = vec![entry("203.0.113.0/24", "global"), entry("any", "local")];
        let told = [
            NeAnswer { entries: Some(entries), more: true, ..answer("10.0.0.1:3262", Outcome::Accepted, None) },
            NeAnswer { entries: Some(Vec::new()), ..answer("10.0.0.2:3262", Outcome::Accepted, None) },
        ];
        let expected = "  \
  NETWORK ELEMENT  INSTALLER  SCOPE   SRC             DST           PORT
  10.0.0.1:3262    10.0.0.11  global  203.0.113.0/24  198.51.100.7  tcp/80
  10.0.0.1:3262    10.0.0.11  local   any             198.51.100.7  tcp/80
10.0.0.1:3262: more than 2; name --src, --dst or --installer
10.0.0.2:3262: none
";
        assert_eq!(listing(&told), expected);
    }

    #[test]
    fn an_agent_is_shown_with_its_elements() {
        let ne = |ne: &str, state: &str| NeStatus {
            ne: ne.into(),
            state: state.into(),
            since_seconds: 65,
            address: None,
            started: Vec::new(),
            refused: Vec::new(),
            health: None,
            why: None,
        };
        let shown = AgentStatus {
            version: "0.1.0".into(),
            pid: 4711,
            uptime_seconds: 7260,
            serving: true,
            services: vec!["tcp/80=l2".into()],
            connections: Some(3),
            health: HealthStatus { index: 40, source: "load".into(), source_index: 93, overridden: true },
            exceptions: ExceptionCount { local: 1, global: 2 },
            nes: vec![
                NeStatus {
                    address: Some([10, 0, 0, 11].into()),
                    started: vec!["tcp/80".into()],
                    health: Some(100),
                    ..ne("10.0.0.1:3262", "serving")
                },
                NeStatus { why: Some("cannot connect: refused".into()), ..ne("10.0.0.2:3262", "away") },
            ],
        };
        let expected = "\
necp 0.1.0 agent pid 4711 up 2h 1m, serving tcp/80=l2, 3 connections
health 40 (set by `necp health`; load says 93)
exceptions 1 local, 2 global

  NETWORK ELEMENT  STATE    FOR    KNOWN AS   STARTED  REFUSED  ITS HEALTH
  10.0.0.1:3262    serving  1m 5s  10.0.0.11  tcp/80   -               100
  10.0.0.2:3262    away     1m 5s  -          -        -                 -
10.0.0.2:3262: cannot connect: refused
";
        assert_eq!(status(&shown), expected);
    }
}
