//! Draining: after STOP has been acknowledged no new flow comes, and the agent stays until those that are there have
//! ended, because what it set up for them (a VIP on `lo`) ends with it.
//!
//! What counts is read from the kernel's socket tables of the network namespace. UDP and other protocols have no end
//! that could be seen; a server of those alone leaves at once.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

/// The socket tables; through `thread-self`, so that a thread in a namespace of its own sees that one.
const TABLES: [&str; 2] = ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"];

/// Counts this host's TCP connections whose local port is one of `ports`.
///
/// # Errors
/// Those of reading `/proc`. A kernel without IPv6 has no second table; that is none.
pub fn connections(ports: &BTreeSet<u16>) -> io::Result<usize> {
    let mut left = 0;
    for path in TABLES {
        match File::open(path) {
            Ok(file) => left += count(BufReader::new(file), ports)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound && path.ends_with('6') => {}
            Err(error) => return Err(error),
        }
    }
    Ok(left)
}

/// Counts the connections to be waited for in a table of the form of `/proc/net/tcp`.
fn count(mut table: impl BufRead, ports: &BTreeSet<u16>) -> io::Result<usize> {
    let mut left = 0;
    let mut line = String::new();
    while table.read_line(&mut line)? > 0 {
        left += usize::from(row(&line).is_some_and(|row| row.holds(ports)));
        line.clear();
    }
    Ok(left)
}

/// One row of a socket table.
struct Row {
    local_port: u16,
    remote: IpAddr,
    /// The kernel's number of the TCP state.
    state: u8,
    /// 0 when no process has the socket any more.
    inode: u64,
}

impl Row {
    /// Whether this connection must be waited for.
    fn holds(&self, ports: &BTreeSet<u16>) -> bool {
        const ESTABLISHED: u8 = 1;
        const SYN_RECV: u8 = 3;
        const FIN_WAIT1: u8 = 4;
        const FIN_WAIT2: u8 = 5;
        const CLOSE_WAIT: u8 = 8;
        const LAST_ACK: u8 = 9;
        const CLOSING: u8 = 11;
        let alive = match self.state {
            // FIN_WAIT1 and LAST_ACK: the server has closed, but the last of what it wrote may still be on its way.
            ESTABLISHED | SYN_RECV | FIN_WAIT1 | CLOSE_WAIT | LAST_ACK | CLOSING => true,
            // All is delivered; it matters only as long as the server still reads.
            FIN_WAIT2 => self.inode != 0,
            _ => false,
        };
        // A peer on this host did not come through a network element: it is a health check, or an administrator.
        alive && ports.contains(&self.local_port) && !self.remote.to_canonical().is_loopback()
    }
}

/// Reads a row; `None` for the heading, and for whatever else is none.
fn row(line: &str) -> Option<Row> {
    let fields: Vec<&str> = line.split_ascii_whitespace().take(10).collect();
    let (_, local_port) = endpoint(fields.get(1)?)?;
    let (remote, _) = endpoint(fields.get(2)?)?;
    Some(Row {
        local_port,
        remote,
        state: u8::from_str_radix(fields.get(3)?, 16).ok()?,
        inode: fields.get(9)?.parse().ok()?,
    })
}

/// `ADDRESS:PORT`, both hexadecimal; the address in 32-bit words of the host's byte order.
fn endpoint(text: &str) -> Option<(IpAddr, u16)> {
    let (address, port) = text.split_once(':')?;
    let word = |at: usize| Some(u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok()?.to_ne_bytes());
    let address = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut octets = [0; 16];
            for (at, four) in octets.chunks_exact_mut(4).enumerate() {
                four.copy_from_slice(&word(at)?);
            }
            IpAddr::V6(Ipv6Addr::from(octets))
        }
        _ => return None,
    };
    Some((address, u16::from_str_radix(port, 16).ok()?))
}

/// What to do after a count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Count again at this moment; `report` when it is time for a line in the log.
    Wait {
        /// When to count again.
        until: Instant,
        /// Whether to tell the operator how many are left.
        report: bool,
    },
    /// Nothing is left.
    Done,
    /// The time is up with connections left.
    TimeIsUp,
}

/// The decisions of a drain, apart from clock and kernel.
#[derive(Debug)]
pub struct Drain {
    deadline: Instant,
    next_report: Instant,
    reported: Option<usize>,
}

impl Drain {
    /// Time between two counts.
    pub const INTERVAL: Duration = Duration::from_millis(200);
    /// Time between two lines in the log.
    pub const REPORT: Duration = Duration::from_secs(5);

    /// A drain that begins `now` and lasts at most `limit`.
    pub fn new(now: Instant, limit: Duration) -> Self {
        Self { deadline: now + limit, next_report: now, reported: None }
    }

    /// Takes note that `left` connections were there at `now`.
    pub fn counted(&mut self, now: Instant, left: usize) -> Step {
        if left == 0 {
            return Step::Done;
        }
        if now >= self.deadline {
            return Step::TimeIsUp;
        }
        let report = now >= self.next_report && self.reported != Some(left);
        if report {
            self.next_report = now + Self::REPORT;
            self.reported = Some(left);
        }
        Step::Wait { until: (now + Self::INTERVAL).min(self.deadline), report }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::{TcpListener, TcpStream};

    use super::*;
    use crate::plane::throwaway_netns::in_new_netns;

    const HEADING: &str =
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    /// A row as the kernel prints it on this host.
    fn line(local: (&str, u16), remote: &str, state: u8, inode: u64) -> String {
        let hex = |address: &str| match address.parse().expect("an address") {
            IpAddr::V4(v4) => format!("{:08X}", u32::from_ne_bytes(v4.octets())),
            IpAddr::V6(v6) => v6
                .octets()
                .chunks_exact(4)
                .map(|four| format!("{:08X}", u32::from_ne_bytes(four.try_into().expect("four"))))
                .collect(),
        };
        format!(
            "  12: {}:{:04X} {}:C350 {state:02X} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1 x\n",
            hex(local.0),
            local.1,
            hex(remote)
        )
    }

    fn counted(text: &str, ports: &[u16]) -> usize {
        count(text.as_bytes(), &ports.iter().copied().collect()).expect("readable")
    }

    #[test]
    fn every_state_counts_as_it_should() {
        let expected =
            [(1, 1), (2, 0), (3, 1), (4, 1), (5, 1), (6, 0), (7, 0), (8, 1), (9, 1), (10, 0), (11, 1), (12, 0)];
        for (state, left) in expected {
            let text = format!("{HEADING}{}", line(("192.0.2.10", 80), "198.51.100.1", state, 77));
            assert_eq!(counted(&text, &[80]), left, "state {state}");
        }
        let orphan = |state| counted(&line(("192.0.2.10", 80), "198.51.100.1", state, 0), &[80]);
        assert_eq!((orphan(4), orphan(5)), (1, 0), "undelivered data counts, a finished half-closed socket does not");
    }

    #[test]
    fn only_served_ports_and_peers_elsewhere_count() {
        let text = [
            line(("192.0.2.10", 80), "198.51.100.1", 1, 1),
            line(("192.0.2.10", 443), "198.51.100.1", 1, 2),
            line(("127.0.0.1", 80), "127.0.0.1", 1, 3),
            line(("::ffff:192.0.2.10", 80), "::ffff:198.51.100.2", 1, 4),
            line(("2001:db8::1", 80), "2001:db8::2", 1, 5),
            line(("::1", 80), "::1", 1, 6),
            line(("::ffff:127.0.0.1", 80), "::ffff:127.0.0.1", 1, 7),
        ]
        .concat();
        assert_eq!((counted(&text, &[80]), counted(&text, &[80, 443]), counted(&text, &[])), (3, 4, 0));
    }

    #[test]
    fn what_is_no_row_is_passed_over() {
        for text in
            ["", "\n", HEADING, "1: 0:0", "1: 0100007F:0050 zz:00 01 a b c d e f g", "1: é:1 é:1 01 0 0 0 0 0 9"]
        {
            assert_eq!(counted(text, &[80, 0]), 0, "{text:?}");
        }
    }

    #[test]
    fn a_real_connection_is_seen_until_it_ends() {
        in_new_netns(async || {
            let (addresses, driver) = crate::plane::host_address::HostAddresses::open("necp-t").expect("netlink");
            tokio::spawn(driver);
            let net = "192.0.2.10/32".parse().expect("a prefix");
            addresses.add("lo", net, crate::plane::host_address::Scope::Global).await.expect("added");
            let listener = TcpListener::bind("192.0.2.10:0").expect("a listener");
            let address = listener.local_addr().expect("its address");
            let ports = BTreeSet::from([address.port()]);
            assert_eq!(connections(&ports).expect("readable"), 0, "a listener is no connection");
            let mut client = TcpStream::connect(address).expect("connected");
            let (server, _) = listener.accept().expect("accepted");
            client.write_all(b"x").expect("written");
            assert_eq!(connections(&ports).expect("readable"), 1);
            drop((client, server));
            let deadline = Instant::now() + Duration::from_secs(5);
            while connections(&ports).expect("readable") > 0 {
                assert!(Instant::now() < deadline, "the connection has ended and is still counted");
                std::thread::sleep(Duration::from_millis(10));
            }
        });
    }

    #[test]
    fn a_drain_ends_when_nothing_is_left_or_the_time_is_up() {
        let start = Instant::now();
        let after = |millis| start + Duration::from_millis(millis);
        let mut drain = Drain::new(start, Duration::from_secs(6));
        assert_eq!(drain.counted(start, 3), Step::Wait { until: after(200), report: true });
        assert_eq!(
            drain.counted(after(200), 2),
            Step::Wait { until: after(400), report: false },
            "too soon for a line"
        );
        assert_eq!(drain.counted(after(5000), 2), Step::Wait { until: after(5200), report: true });
        assert_eq!(
            drain.counted(after(5900), 2),
            Step::Wait { until: after(6000), report: false },
            "never beyond the end"
        );
        assert_eq!(drain.counted(after(6000), 2), Step::TimeIsUp);
        assert_eq!(drain.counted(after(6000), 0), Step::Done);
    }

    #[test]
    fn no_time_at_all_still_looks_once() {
        let start = Instant::now();
        assert_eq!(Drain::new(start, Duration::ZERO).counted(start, 0), Step::Done);
        assert_eq!(Drain::new(start, Duration::ZERO).counted(start, 1), Step::TimeIsUp);
    }
}
