//! The test bed itself: what the other tests stand on.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddrV4},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use necp_tests::{
    capture::{self, Capture},
    echo::{Hold, UdpEcho},
    frame::{self, Flow, flags},
    link::{self, Offload},
    load::{Client, Event, Failure, Kind, Load, Mix},
    netns::{Background, Namespace, wait_until},
    nginx::{Content, Nginx},
    process::Process,
    raw::RawSocket,
    topology::{self, Topology, VIP, client_address, server_address},
    xdp,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::watch,
};

const SOON: Duration = Duration::from_secs(5);
const MEBIBYTE: usize = 1 << 20;

#[test]
fn comes_up_quickly_and_every_host_answers() -> Result<()> {
    for builder in [Topology::builder(), Topology::builder().two_interfaces()] {
        let started = Instant::now();
        let bed = builder.servers(4).build()?;
        let took = started.elapsed();
        bed.check()?;
        link::ping(bed.server(0).ns(), topology::NE, SOON)?;
        // About 0.2 s on an idle host; the bound only catches a wait that should not be there.
        assert!(took < SOON, "the bed took {took:?}");
    }
    Ok(())
}

#[test]
fn checksums_are_finished() -> Result<()> {
    let bed = Topology::builder().two_interfaces().build()?;
    for host in [bed.client(), bed.ne(), bed.server(0).ns()] {
        assert!(!link::offload(host, "eth0", Offload::TxChecksum)?, "{}", host.name());
    }
    Ok(())
}

/// A control without the bed's program at the switch's port shows that the frame's coming is the bed's doing.
#[test]
fn what_xdp_transmits_arrives() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let _link = xdp::attach(bed.ne(), "eth0", xdp::Action::Transmit)?;
    let to_ne = |destination_mac: [u8; 6]| Flow {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac,
        source: SocketAddrV4::new(client_address(0), 5555),
        destination: SocketAddrV4::new(VIP, 9),
        ttl: 64,
    };
    let flow = to_ne(link::mac(bed.ne(), "eth0")?);
    let (client, switch) = (RawSocket::open(bed.client(), "eth0")?, RawSocket::open(bed.switch(), "ne0")?);
    for payload in [b"first", b"other", b"third"] {
        client.send(&flow.udp(payload))?;
        let is_it = |frame: &[u8]| frame::parse(frame).is_some_and(|seen| seen.payload == payload);
        assert!(switch.receive(SOON, is_it)?.is_some());
    }

    bed.switch().ip_batch("link add bare0 type veth peer name bare1\nlink set bare0 up\nlink set bare1 up\n")?;
    let _link = xdp::attach(bed.switch(), "bare1", xdp::Action::Transmit)?;
    let bare = RawSocket::open(bed.switch(), "bare0")?;
    bare.send(&to_ne(link::mac(bed.switch(), "bare1")?).udp(b"lost"))?;
    let is_it = |frame: &[u8]| frame::parse(frame).is_some_and(|seen| seen.payload == b"lost");
    assert!(bare.receive(Duration::from_millis(200), is_it)?.is_none());
    Ok(())
}

#[test]
fn web_servers_answer_with_their_names() -> Result<()> {
    let bed = Topology::builder().build()?;
    let content = Content::new(&bed, MEBIBYTE)?;
    let _nginx = start_all(&bed, &content)?;
    for server in bed.servers() {
        let client = Client::new(SocketAddrV4::new(server.ip(), 80));
        let outcome = bed.client().block_on(client.short(client_address(7), "/", |_| ()));
        assert_eq!((outcome.failure, outcome.answered), (None, 1));
        assert_eq!(outcome.server.as_deref(), Some(server.name()));
        assert_eq!(outcome.local.map(|local| *local.ip()), Some(client_address(7)));
    }
    Ok(())
}

#[test]
fn downloads_are_compared_with_the_content() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let content = Content::new(&bed, 8 * MEBIBYTE)?;
    let _nginx = start_all(&bed, &content)?;
    let client = Client::new(SocketAddrV4::new(server_address(0), 80));
    let download = |content: &Content, path: &'static str| {
        bed.client().block_on(client.download(client_address(0), path, content, |_| ()))
    };
    let outcome = download(&content, "/big");
    assert_eq!((outcome.failure, outcome.bytes), (None, content.length));
    let mut other = content.clone();
    other.sha256[0] ^= 1;
    assert_eq!(download(&other, "/big").failure, Some(Failure::Checksum));
    assert_eq!(download(&content, "/nothing").failure, Some(Failure::Status(404)));
    Ok(())
}

#[test]
fn a_rate_makes_a_download_long() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let content = Content::new(&bed, MEBIBYTE)?;
    let _nginx = start_all(&bed, &content)?;
    let client = Client::new(SocketAddrV4::new(server_address(0), 80));
    let outcome = bed.client().block_on(client.download(client_address(0), "/big?rate=512k", &content, |_| ()));
    assert_eq!(outcome.failure, None);
    assert!(outcome.lasted > Duration::from_secs(1), "{:?}", outcome.lasted);
    Ok(())
}

#[test]
fn a_server_answers_for_the_vip_directly() -> Result<()> {
    let bed = Topology::builder().build()?;
    let content = Content::new(&bed, MEBIBYTE)?;
    let _nginx = start_all(&bed, &content)?;
    let client = Client { patience: Duration::from_millis(300), ..Client::new(SocketAddrV4::new(VIP, 80)) };
    let get = || bed.client().block_on(client.short(client_address(0), "/", |_| ()));
    let outcome = get();
    assert!(matches!(outcome.failure, Some(Failure::Connect(_))), "no server may answer ARP for the VIP: {outcome:?}");
    point_vip_at(&bed, bed.server(1).mac()?)?;
    assert_eq!(get().server.as_deref(), Some("s2"));
    Ok(())
}

#[test]
fn answers_find_their_way_around_an_ne_with_two_interfaces() -> Result<()> {
    let bed = Topology::builder().two_interfaces().build()?;
    let content = Content::new(&bed, MEBIBYTE)?;
    let _nginx = start_all(&bed, &content)?;
    // The NE's kernel as a router stands in for the packet path.
    bed.ne().ip_batch(&format!("route add {VIP} via {}\n", server_address(2)))?;
    point_vip_at(&bed, link::mac(bed.ne(), "eth0")?)?;
    let client = Client::new(SocketAddrV4::new(VIP, 80));
    let outcome = bed.client().block_on(client.download(client_address(3), "/big", &content, |_| ()));
    assert_eq!((outcome.failure, outcome.server.as_deref()), (None, Some("s3")));
    Ok(())
}

#[test]
fn udp_and_lasting_tcp_servers_answer_from_the_address_that_was_asked() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let server = bed.server(0);
    let _echo = UdpEcho::start(server.ns(), server.name(), &[VIP, server.ip()], 53)?;
    let _hold = Hold::start(server.ns(), server.name(), 7)?;
    point_vip_at(&bed, server.mac()?)?;
    for address in [VIP, server.ip()] {
        let (datagram, greeting) = bed.client().block_on(async move {
            let socket = UdpSocket::bind((client_address(9), 0)).await?;
            socket.connect((address, 53)).await?;
            socket.send(b"ping").await?;
            let mut datagram = [0; 64];
            let length = tokio::time::timeout(SOON, socket.recv(&mut datagram)).await??;
            let mut stream = BufReader::new(TcpStream::connect((address, 7)).await?);
            let mut greeting = String::new();
            stream.read_line(&mut greeting).await?;
            stream.write_all(b"again\n").await?;
            stream.read_line(&mut greeting).await?;
            anyhow::Ok((String::from_utf8_lossy(&datagram[..length]).into_owned(), greeting))
        })?;
        assert_eq!((datagram.as_str(), greeting.as_str()), ("s1 ping", "s1\nagain\n"));
    }
    Ok(())
}

#[test]
fn frames_made_by_hand_arrive_as_they_are() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let flow = Flow {
        source_mac: link::mac(bed.client(), "eth0")?,
        destination_mac: bed.server(0).mac()?,
        source: SocketAddrV4::new(client_address(5), 5555),
        destination: SocketAddrV4::new(server_address(0), 9),
        ttl: 17,
    };
    let (client, server) = (RawSocket::open(bed.client(), "eth0")?, RawSocket::open(bed.server(0).ns(), "eth0")?);
    let sent = flow.tcp(flags::SYN, 42, 0, b"early");
    client.send(&sent)?;
    let is_ours = |frame: &[u8]| frame::parse(frame).is_some_and(|seen| seen.flow == flow);
    assert_eq!(server.receive(SOON, is_ours)?, Some(sent));
    // Nobody listens on port 9: the server's kernel has found the checksum right, and refuses.
    let refuses = |frame: &[u8]| {
        frame::parse(frame)
            .is_some_and(|seen| seen.flow.source == flow.destination && seen.tcp.is_some_and(|tcp| tcp.rst))
    };
    assert!(client.receive(SOON, refuses)?.is_some());
    Ok(())
}

#[test]
fn a_capture_sees_first_syns_both_ways_and_when() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let content = Content::new(&bed, MEBIBYTE)?;
    let _nginx = start_all(&bed, &content)?;
    let mut capture = Capture::open(bed.switch(), bed.server(0).name(), 80, 3262)?;
    let mut inside = Capture::open(bed.server(0).ns(), "eth0", 80, 3262)?;
    let before = capture::now();
    let client = Client::new(SocketAddrV4::new(server_address(0), 80));
    let outcome = bed.client().block_on(client.short(client_address(3), "/", |_| ()));
    let after = capture::now();
    assert_eq!(outcome.failure, None);
    for (capture, outgoing) in [(&mut capture, true), (&mut inside, false)] {
        let syn = capture.next(SOON)?.context("no SYN was captured")?;
        let seen = frame::parse(&syn.frame).context("TCP")?;
        assert_eq!((Some(seen.flow.source), syn.outgoing), (outcome.local, outgoing));
        assert!(before <= syn.at && syn.at <= after, "{before:?} {:?} {after:?}", syn.at);
        assert_eq!(
            capture.next(Duration::from_millis(50))?,
            None,
            "the rest of the connection does not fit the filter"
        );
        assert_eq!(capture.dropped()?, 0);
    }
    // The other port: every segment, here a SYN that is refused.
    let refused = Client::new(SocketAddrV4::new(server_address(0), 3262));
    assert!(bed.client().block_on(refused.short(client_address(3), "/", |_| ())).failure.is_some());
    let mut next = || anyhow::Ok(capture.next(SOON)?.context("not captured")?.outgoing);
    assert_eq!([next()?, next()?], [true, false]);
    Ok(())
}

#[test]
fn a_broken_connection_is_noticed() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let content = Content::new(&bed, MEBIBYTE)?;
    let mut nginx = Nginx::start(&bed, bed.server(0).ns(), "s1", &[80], &content)?;
    let mix = Mix {
        short: 1,
        short_pause: Duration::from_millis(5),
        downloads: 1,
        download_path: "/big?rate=100k".to_owned(),
        content,
        keep_alive: 2,
        keep_alive_pause: Duration::from_millis(5),
        sources: 100,
    };
    let load = Load::start(bed.client(), Client::new(SocketAddrV4::new(server_address(0), 80)), &mix)?;
    let mut placed = 0;
    let is_long = |event: &&Event| matches!(event, Event::Placed { kind, .. } if *kind != Kind::Short);
    wait_until("the long connections stand", SOON, || {
        placed += load.events(Duration::from_millis(10)).iter().filter(is_long).count();
        placed >= 3
    })?;
    nginx.process().kill();
    let mut events = Vec::new();
    let refused =
        |event: &Event| matches!(event, Event::Ended(outcome) if matches!(outcome.failure, Some(Failure::Connect(_))));
    wait_until("connections after the end are refused", SOON, || {
        events.extend(load.events(Duration::from_millis(10)));
        events.iter().any(refused)
    })?;
    let (last, cut) = load.finish(SOON);
    events.extend(last);
    assert_eq!(cut, 0);
    let broken = |wanted: Kind| {
        let hit = |event: &&Event| {
            matches!(event, Event::Ended(outcome) if outcome.kind == wanted
                && outcome.failure.as_ref().is_some_and(Failure::hit_established))
        };
        events.iter().filter(hit).count()
    };
    assert_eq!((broken(Kind::Download), broken(Kind::KeepAlive)), (1, 2));
    Ok(())
}

#[test]
fn an_answer_from_another_server_is_noticed() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let _server = two_faced_server(bed.server(0).ns())?;
    let client = Client::new(SocketAddrV4::new(server_address(0), 80));
    let (_stop, stopped) = watch::channel(false);
    let outcome = bed.client().block_on(client.keep_alive(client_address(0), Duration::ZERO, stopped, |_| ()));
    assert_eq!(outcome.failure, Some(Failure::Moved { from: "s1".to_owned(), to: "s2".to_owned() }));
    assert_eq!(outcome.answered, 2);
    Ok(())
}

#[test]
fn a_server_can_be_unplugged_and_change_its_hardware_address() -> Result<()> {
    let bed = Topology::builder().servers(1).build()?;
    let server = bed.server(0);
    server.unplug()?;
    assert!(link::ping(bed.client(), server.ip(), Duration::from_millis(300)).is_err());
    server.plug()?;
    link::ping(bed.client(), server.ip(), SOON)?;
    let mac = [2, 0, 0, 0, 0xab, 0xcd];
    server.set_mac(mac)?;
    assert_eq!(server.mac()?, mac);
    bed.client().ip_batch("neigh flush dev eth0\n")?;
    link::ping(bed.client(), server.ip(), SOON)?;
    Ok(())
}

#[test]
fn a_dropped_bed_leaves_nothing() -> Result<()> {
    let bed = Topology::builder().build()?;
    let name = bed.name().to_owned();
    let content = Content::new(&bed, 1000)?;
    let mut nginx = start_all(&bed, &content)?;
    let pids: Vec<_> = nginx.iter_mut().map(|nginx| nginx.process().pid()).collect();
    assert_eq!(namespaces_of(&name), 6);
    drop((nginx, bed));
    assert_eq!(namespaces_of(&name), 0);
    assert!(!std::env::temp_dir().join(&name).exists());
    assert!(pids.iter().all(|pid| !is_alive(*pid)));
    Ok(())
}

#[test]
fn a_panic_leaves_nothing() {
    let name = std::sync::Mutex::new(String::new());
    let result = std::panic::catch_unwind(|| {
        let bed = Topology::builder().build().expect("a bed");
        bed.name().clone_into(&mut name.lock().expect("no panic so far"));
        assert_eq!(namespaces_of(bed.name()), 7, "this panic is meant");
    });
    assert!(result.is_err());
    assert_eq!(namespaces_of(&name.into_inner().expect("no panic within the lock")), 0);
}

/// This test starts itself again as another process, which holds a bed and is then ended from outside.
#[test]
fn a_killed_process_leaves_nothing() -> Result<()> {
    const MARK: &str = "NECP_TESTS_HOLD_A_BED";
    if let Some(file) = std::env::var_os(MARK) {
        let bed = Topology::builder().servers(1).build()?;
        let content = Content::new(&bed, 1000)?;
        let mut nginx = start_all(&bed, &content)?;
        let story = format!("{} {}", bed.name(), nginx[0].process().pid());
        fs::write(Path::new(&file).with_extension("new"), story)?;
        fs::rename(Path::new(&file).with_extension("new"), &file)?;
        loop {
            std::thread::park();
        }
    }
    let dir = tempfile::tempdir()?;
    let hold = |label: &str| {
        let file = dir.path().join(label);
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command.args(["--exact", "a_killed_process_leaves_nothing", "--nocapture"]).env(MARK, &file);
        let mut process = Process::spawn(command, label, dir.path())?;
        process.wait_until("it holds a bed", 2 * SOON, |_| file.exists())?;
        let story = fs::read_to_string(&file)?;
        let (name, pid) = story.split_once(' ').context("a name and a process id")?;
        anyhow::Ok((process, name.to_owned(), pid.parse::<u32>()?))
    };
    let ends = |label: &str, signal: i32| {
        let (mut process, name, nginx) = hold(label)?;
        assert_eq!(namespaces_of(&name), 4);
        process.signal(signal)?;
        process.wait(SOON)?;
        wait_until("nginx dies with the process", SOON, || !is_alive(nginx))?;
        anyhow::Ok(name)
    };
    for (label, signal) in [("interrupted", libc::SIGINT), ("terminated", libc::SIGTERM)] {
        assert_eq!(namespaces_of(&ends(label, signal)?), 0, "{label}");
    }
    // After SIGKILL it is for the next process to sweep.
    let killed = ends("killed", libc::SIGKILL)?;
    let next = ends("next", libc::SIGTERM)?;
    assert_eq!((namespaces_of(&killed), namespaces_of(&next)), (0, 0));
    assert!(!std::env::temp_dir().join(killed).exists());
    Ok(())
}

fn start_all(bed: &Topology, content: &Content) -> Result<Vec<Nginx>> {
    let start = |server: &topology::Server| Nginx::start(bed, server.ns(), server.name(), &[80], content);
    bed.servers().iter().map(start).collect()
}

/// What an NE's answer to ARP would do.
fn point_vip_at(bed: &Topology, mac: [u8; 6]) -> Result<()> {
    let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
    bed.client().ip_batch(&format!("neigh replace {VIP} lladdr {mac} dev eth0 nud permanent\n"))
}

/// Answers two requests of a connection as s1, then as s2.
fn two_faced_server(ns: &Namespace) -> Result<Background> {
    let listener = ns.run(|| std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)))?;
    listener.set_nonblocking(true)?;
    let serve = async move {
        let listener = TcpListener::from_std(listener).expect("a nonblocking socket");
        let (mut stream, _) = listener.accept().await.expect("a connection");
        let mut request = [0; 4096];
        for name in ["s1", "s1", "s2"] {
            assert!(stream.read(&mut request).await.expect("a request") > 0);
            let answer = format!("HTTP/1.1 200 OK\r\nX-Server: {name}\r\nContent-Length: 0\r\n\r\n");
            stream.write_all(answer.as_bytes()).await.expect("a client");
        }
    };
    Ok(ns.background(serve)?)
}

fn namespaces_of(bed: &str) -> usize {
    let entries = fs::read_dir("/run/netns").map(|entries| entries.flatten().collect()).unwrap_or_else(|_| Vec::new());
    let prefix = format!("{bed}-");
    entries.iter().filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix)).count()
}

fn is_alive(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    !status.is_empty() && !status.contains(") Z ")
}
