//! The tables of `necp status`: plain text, aligned, without borders.

use std::fmt::Write as _;

use comfy_table::{CellAlignment, Table, presets};

use super::{Exceptions, Farm, Status};
use crate::control::weight::ONE;

/// Servers named in the line of exceptions, those with the most.
const SERVERS_SHOWN: usize = 5;

/// All of it.
pub fn tables(status: &Status) -> String {
    let mut text = head(status);
    for alarm in &status.alarms {
        let _ = writeln!(text, "ALARM: {alarm}");
    }
    for farm in &status.farms {
        text.push('\n');
        text.push_str(&farm_text(farm));
    }
    text.push('\n');
    text.push_str(&packets(status));
    text.push_str(&strangers(status));
    text.push_str(&rejected(status));
    text
}

fn head(status: &Status) -> String {
    let interfaces: Vec<String> =
        status.interfaces.iter().map(|port| format!("{} ({})", port.name, port.mode)).collect();
    let mut text = format!(
        "necp {} pid {} up {} on {}, listening on {}, {} sessions{}\n",
        status.version,
        status.pid,
        duration(status.uptime_seconds),
        interfaces.join(" "),
        status.listen.join(" "),
        status.sessions,
        if status.took_over { ", took over from an earlier daemon" } else { "" }
    );
    if status.pending_writes > 0 || status.failed_writes > 0 {
        let _ = writeln!(text, "map writes: {} pending, {} failed", status.pending_writes, status.failed_writes);
    }
    if status.exceptions > 0 {
        let _ = writeln!(text, "exceptions: {} of at most {}", status.exceptions, status.max_exceptions);
    }
    text
}

fn farm_text(farm: &Farm) -> String {
    let (vips, prefixes) = (words(&farm.vips), words(&farm.intercept));
    let place = if prefixes.is_empty() { format!("at {vips}") } else { format!("intercepts {prefixes}") };
    let authenticated = if farm.authenticated { ", authenticated" } else { "" };
    let mut text = format!("farm {} {place}{authenticated}\n", farm.name);
    let mut table = table(&[
        "SERVICE",
        "SERVER",
        "BY",
        "STATE",
        "HEALTH",
        "WEIGHT",
        "SLOTS",
        "SHARE",
        "RECORDS",
        "FLOWS/S",
        "PACKETS/S",
        "BYTES",
    ]);
    for service in &farm.services {
        if service.servers.is_empty() {
            let empty = String::from("-");
            let family = if farm.services.iter().any(|other| other.family != service.family) {
                format!("no {} server", service.family)
            } else {
                "no server".into()
            };
            let mut row = vec![service.service.clone(), family];
            row.extend(std::iter::repeat_n(empty, 10));
            table.add_row(row);
        }
        for server in &service.servers {
            let unreachable = if server.reachable { "" } else { ", unreachable" };
            table.add_row([
                service.service.clone(),
                server.address.to_string(),
                server.forwarding.to_string(),
                format!("{}{unreachable}", server.state),
                server.health.map_or_else(|| "-".into(), |health| health.to_string()),
                weight(server.weight),
                server.slots.to_string(),
                format!("{:.1}%", server.slots_percent),
                server.flows_on_record.to_string(),
                rate(server.flows_per_second),
                rate(server.packets_per_second),
                bytes(server.bytes),
            ]);
        }
    }
    finish(table, 4, &mut text);
    text.push_str(&exceptions(farm));
    text
}

fn words<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(" ")
}

/// One line, of farms that have some.
fn exceptions(farm: &Farm) -> String {
    let Exceptions { local, global, masks, max_masks, max_by_server, by_server } = &farm.exceptions;
    if by_server.is_empty() {
        return String::new();
    }
    let shown = by_server.iter().take(SERVERS_SHOWN).map(|one| format!("{} {}", one.address, one.exceptions));
    let more = by_server.len().saturating_sub(SERVERS_SHOWN);
    let more = (more > 0).then(|| format!("{more} more"));
    let servers: Vec<String> = shown.chain(more).collect();
    let servers = servers.join(", ");
    format!(
        "  exceptions: {local} local, {global} global, {masks} of {max_masks} masks; by server (at most {max_by_server}): {servers}\n"
    )
}

fn packets(status: &Status) -> String {
    let mut text = String::from("packets\n");
    let mut table = table(&["REASON", "ACTION", "PACKETS", "PER SECOND"]);
    for packets in status.packets.iter().filter(|packets| packets.packets > 0) {
        let numbers = [packets.packets.to_string(), rate(packets.per_second)];
        table.add_row([packets.reason.to_string(), packets.action.to_string()].into_iter().chain(numbers));
    }
    finish(table, 2, &mut text);
    text
}

fn strangers(status: &Status) -> String {
    let strangers = &status.strangers;
    let kinds = [
        ("not admitted", strangers.not_admitted),
        ("too many", strangers.too_many),
        ("silent", strangers.silent),
        ("not NECP", strangers.not_necp),
        ("HTTP", strangers.http),
        ("TLS", strangers.tls),
        ("SSH", strangers.ssh),
    ];
    let seen: Vec<String> =
        kinds.iter().filter(|(_, count)| *count > 0).map(|(kind, count)| format!("{count} {kind}")).collect();
    if seen.is_empty() { String::new() } else { format!("\nconnections turned away: {}\n", seen.join(", ")) }
}

fn rejected(status: &Status) -> String {
    let rejected = &status.rejected;
    let kinds = [
        ("INIT without credential", rejected.unauthenticated),
        ("INIT without a key for it", rejected.no_key),
        ("wrong credential", rejected.bad_credential),
        ("no credential", rejected.stripped),
        ("bad sequence number", rejected.bad_sequence),
        ("too large", rejected.too_large),
        ("INIT sent again", rejected.unconfirmed),
    ];
    let seen: Vec<String> =
        kinds.iter().filter(|(_, count)| *count > 0).map(|(kind, count)| format!("{count} {kind}")).collect();
    if seen.is_empty() { String::new() } else { format!("\nrejected by authentication: {}\n", seen.join(", ")) }
}

pub(in crate::daemon) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header(header);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    table
}

/// Adds the table to `text`; columns from `numbers` on are aligned to the right.
pub(in crate::daemon) fn finish(mut table: Table, numbers: usize, text: &mut String) {
    for column in table.column_iter_mut().skip(numbers) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for line in table.lines() {
        let _ = writeln!(text, "  {}", line.trim());
    }
}

/// `3d 4h`, `4h 5m`, `5m 6s`, `6s`.
pub(in crate::daemon) fn duration(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m {}s", seconds % 60),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

/// `1.00`: health 100, capacity 1.0.
fn weight(weight: u32) -> String {
    let share = f64::from(weight) / f64::from(ONE);
    if weight > 0 && share < 0.01 { "<0.01".into() } else { format!("{share:.2}") }
}

fn rate(rate: f64) -> String {
    if rate > 0.0 && rate < 10.0 { format!("{rate:.1}") } else { format!("{rate:.0}") }
}

/// `999 B`, `1.2 MiB`.
fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::status::{ExceptionsOf, Interface, Packets, Rejected, Server, Service, Strangers};

    pub fn sample() -> Status {
        let server = |address: [u8; 4], state: &'static str, health, slots: u32| Server {
            id: 2 + slots,
            address: address.into(),
            forwarding: "l2".into(),
            state: state.into(),
            reachable: slots > 0,
            health,
            weight: slots * 500,
            slots,
            slots_percent: f64::from(slots * 100 / 251),
            flows_on_record: 12,
            flows: 100,
            flows_per_second: 3.25,
            packets: 1000,
            packets_per_second: 51_234.25,
            bytes: 1_300_000,
            bytes_per_second: 70_000.0,
            replies: 0,
            one_way: false,
        };
        Status {
            version: "0.1.0".into(),
            pid: 4711,
            uptime_seconds: 3 * 3600 + 125,
            took_over: true,
            pin: "/sys/fs/bpf/necp".into(),
            listen: vec!["0.0.0.0:3262".into()],
            interfaces: vec![Interface {
                name: "eth0".into(),
                ifindex: 2,
                mac: "02:00:00:00:00:01".into(),
                mtu: 1500,
                mode: "native".into(),
            }],
            sessions: 1,
            connections: 1,
            farms: vec![Farm {
                name: "web".into(),
                vips: vec![[192, 0, 2, 10].into()],
                intercept: Vec::new(),
                authenticated: true,
                services: vec![
                    Service {
                        service: "tcp/80".into(),
                        family: "IPv4".into(),
                        slots: 251,
                        servers: vec![
                            server([10, 0, 0, 11], "up", Some(100), 251),
                            server([10, 0, 0, 12], "lost", None, 0),
                        ],
                    },
                    Service { service: "udp/443".into(), family: "IPv4".into(), slots: 251, servers: Vec::new() },
                ],
                exceptions: Exceptions {
                    local: 20,
                    global: 1,
                    masks: 3,
                    max_masks: 32,
                    max_by_server: 65_536,
                    by_server: (0..7)
                        .map(|at| ExceptionsOf { address: [10, 0, 0, 11 + at].into(), exceptions: 6 - u32::from(at) })
                        .collect(),
                },
            }],
            exceptions: 21,
            max_exceptions: 1 << 20,
            packets: vec![
                Packets { reason: "plain".into(), action: "transmit".into(), packets: 1000, per_second: 51_234.25 },
                Packets { reason: "bad-tables".into(), action: "drop".into(), packets: 0, per_second: 0.0 },
            ],
            strangers: Strangers { not_admitted: 3, ..Strangers::default() },
            rejected: Rejected { bad_credential: 2, unconfirmed: 1, ..Rejected::default() },
            alarms: vec!["farm web: most servers were lost at once".into()],
            pending_writes: 1,
            failed_writes: 7,
        }
    }

    #[test]
    fn a_status_is_plain_aligned_text() {
        let expected = "\
necp 0.1.0 pid 4711 up 3h 2m on eth0 (native), listening on 0.0.0.0:3262, 1 sessions, took over from an earlier daemon
map writes: 1 pending, 7 failed
exceptions: 21 of at most 1048576
ALARM: farm web: most servers were lost at once

farm web at 192.0.2.10, authenticated
  SERVICE  SERVER     BY  STATE              HEALTH  WEIGHT  SLOTS   SHARE  RECORDS  FLOWS/S  PACKETS/S    BYTES
  tcp/80   10.0.0.11  l2  up                    100    1.25    251  100.0%       12      3.2      51234  1.2 MiB
  tcp/80   10.0.0.12  l2  lost, unreachable       -    0.00      0    0.0%       12      3.2      51234  1.2 MiB
  udp/443  no server  -   -                       -       -      -       -        -        -          -        -
  exceptions: 20 local, 1 global, 3 of 32 masks; by server (at most 65536): \
10.0.0.11 6, 10.0.0.12 5, 10.0.0.13 4, 10.0.0.14 3, 10.0.0.15 2, 2 more

packets
  REASON  ACTION    PACKETS  PER SECOND
  plain   transmit     1000       51234

connections turned away: 3 not admitted

rejected by authentication: 2 wrong credential, 1 INIT sent again
";
        assert_eq!(tables(&sample()), expected);
    }

    #[test]
    fn a_farm_of_both_families_says_whose_servers_are_missing() {
        let mut farm = sample().farms.remove(0);
        farm.vips.push("2001:db8::10".parse().expect("an address"));
        farm.services[1].family = "IPv6".into();
        let text = farm_text(&farm);
        assert!(text.starts_with("farm web at 192.0.2.10 2001:db8::10, authenticated\n"), "{text}");
        assert!(text.contains("\n  udp/443  no IPv6 server  -"), "{text}");
    }

    #[test]
    fn a_farm_that_intercepts_shows_its_prefixes() {
        let intercept = ["203.0.113.0/24", "10.0.0.0/8"].map(|net| net.parse().expect("a prefix")).to_vec();
        let farm = Farm { vips: Vec::new(), intercept, ..sample().farms.remove(0) };
        assert!(farm_text(&farm).starts_with("farm web intercepts 203.0.113.0/24 10.0.0.0/8, authenticated\n"));
    }

    #[test]
    fn a_status_survives_json() {
        let text = serde_json::to_string(&sample()).expect("JSON");
        assert_eq!(serde_json::from_str::<Status>(&text).expect("the same"), sample());
        assert!(text.contains("\"health\":null"), "absent values are null, not left out");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [0, 1, 999, 1000, 50_000, 100_000, 1000 * ONE].map(weight),
            ["0.00", "<0.01", "<0.01", "0.01", "0.50", "1.00", "1000.00"]
        );
        assert_eq!([0.0, 0.25, 9.94, 10.0, 1234.5].map(rate), ["0", "0.2", "9.9", "10", "1234"]);
        assert_eq!(
            [0, 1023, 1024, 1_048_575, u64::MAX].map(bytes),
            ["0 B", "1023 B", "1.0 KiB", "1.0 MiB", "16.0 EiB"]
        );
        assert_eq!([5, 65, 7260, 90_000].map(duration), ["5s", "1m 5s", "2h 1m", "1d 1h"]);
    }
}
