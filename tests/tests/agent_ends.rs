//! What an agent leaves behind: nothing, however it ends, and nothing of another's is taken away.

use std::{ffi::CString, fs, os::unix::ffi::OsStrExt as _, time::Duration};

use anyhow::{Result, ensure};
use necp_tests::{
    daemon::ServerElement,
    topology::{NE, Topology},
};

const SOON: Duration = Duration::from_secs(10);
const VIP: &str = "198.51.100.10";
const VIP6: &str = "2001:db8:f::10";

/// A server, and the address of a balancer that is not there.
struct Host {
    bed: Topology,
    ne: String,
}

impl Host {
    fn new() -> Result<Self> {
        let bed = Topology::builder().servers(1).vip_on_servers(false).ipv6().build()?;
        let nothing = [("net/ipv4/conf/all/arp_ignore", "0"), ("net/ipv4/conf/all/arp_announce", "0")];
        bed.server(0).ns().sysctl(&nothing)?;
        Ok(Self { bed, ne: NE.to_string() })
    }

    fn start(&self, name: &str, args: &[&str]) -> Result<ServerElement> {
        let args = [&["--ne", &self.ne, "--serve", "tcp/80=l2", "--drain", "0"], args].concat();
        ServerElement::start_unconnected(&self.bed, self.bed.server(0).ns(), name, &args)
    }

    /// Until it has said why it has no session, which it looks for when all else is set up.
    fn run(&self, name: &str, args: &[&str]) -> Result<ServerElement> {
        let mut agent = self.start(name, args)?;
        agent.process().wait_for_log("retry in", SOON)?;
        Ok(agent)
    }

    /// Of the VIPs, the ARP settings and the program that unwraps, what is there.
    fn shows(&self) -> Result<Vec<&'static str>> {
        let ip = |args: &[&str]| -> Result<String> {
            let output = self.bed.server(0).ns().command("ip").args(args).output()?;
            ensure!(output.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        };
        let (addresses, links) = (ip(&["addr", "show", "dev", "lo"])?, ip(&["link", "show"])?);
        let xdp_on = |name: &str| links.lines().any(|line| line.contains(&format!(" {name}")) && line.contains("xdp"));
        let arp = self.bed.server(0).ns().run(|| fs::read_to_string("/proc/sys/net/ipv4/conf/all/arp_ignore"));
        let facts = [
            (VIP, addresses.contains(VIP)),
            (VIP6, addresses.contains(VIP6)),
            ("arp", arp?.trim() != "0"),
            ("xdp on eth0", xdp_on("eth0")),
            ("xdp on lo", xdp_on("lo:")),
        ];
        Ok(facts.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect())
    }
}

#[test]
fn two_agents_of_one_host_leave_each_other_alone() -> Result<()> {
    let host = Host::new()?;
    let before = host.shows()?;
    let mut four = host.run("se", &["--vip", VIP])?;
    let mut six = host.run("se6", &["--vip", VIP6])?;
    assert_eq!(host.shows()?, [VIP, VIP6, "arp"]);
    assert!(six.process().terminate(SOON)?.success());
    assert_eq!(host.shows()?, [VIP, "arp"]);
    let mut six = host.run("se6", &["--vip", VIP6, "--vip", VIP])?;
    assert!(four.process().terminate(SOON)?.success());
    assert_eq!(host.shows()?, [VIP, VIP6, "arp"], "it is the other one's too");
    assert!(six.process().terminate(SOON)?.success());
    assert_eq!(host.shows()?, before);
    Ok(())
}

#[test]
fn a_start_that_fails_leaves_nothing() -> Result<()> {
    let host = Host::new()?;
    let before = host.shows()?;
    for (name, ne, socket, error) in [
        ("taken", &*host.ne, "/proc/none/se.sock", "cannot listen on the agent's socket"),
        ("unknown", "no-such-host.invalid", "", "must know the address of no-such-host.invalid"),
    ] {
        let mut args = vec!["--ne", ne, "--vip", VIP, "--decap", "eth0"];
        if !socket.is_empty() {
            args.extend(["--socket", socket]);
        }
        let ns = host.bed.server(0).ns();
        let mut agent = ServerElement::start_unconnected(&host.bed, ns, name, &args)?;
        let status = agent.process().wait(4 * SOON)?;
        let log = agent.process().log();
        assert!(status.code() == Some(1) && log.contains(error), "{status}: {log}");
        assert!(log.contains("VIP set up"), "it has got so far: {log}");
        assert_eq!(host.shows()?, before, "{log}");
    }
    Ok(())
}

#[test]
fn a_program_that_a_crash_has_left_goes_at_the_next_start() -> Result<()> {
    let host = Host::new()?;
    let before = host.shows()?;
    for (next, shows) in [(&[][..], &[][..]), (&["--decap", "lo"], &["xdp on lo"])] {
        let mut agent = host.run("se", &["--decap", "eth0"])?;
        assert_eq!(host.shows()?, [&before[..], &["xdp on eth0"]].concat());
        agent.process().kill();
        assert_eq!(host.shows()?, [&before[..], &["xdp on eth0"]].concat(), "it stays");
        let mut agent = host.run("se", next)?;
        assert_eq!(host.shows()?, [&before[..], shows].concat());
        assert!(agent.process().terminate(SOON)?.success());
        assert_eq!(host.shows()?, before);
    }
    Ok(())
}

#[test]
fn a_pipe_in_place_of_a_health_file_is_health_0_and_no_obstacle_to_the_end() -> Result<()> {
    let host = Host::new()?;
    let pipe = host.bed.dir().join("health");
    let path = CString::new(pipe.as_os_str().as_bytes())?;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    ensure!(unsafe { libc::mkfifo(path.as_ptr(), 0o600) } == 0, "no FIFO: {}", std::io::Error::last_os_error());
    let source = format!("file:{}", pipe.display());
    let mut agent = host.run("se", &["--health", &source, "--health-interval", "0.1", "--health-timeout", "0.1"])?;
    let log = agent.process().log();
    assert!(log.contains("health 0: cannot read") && log.contains("it is no regular file"), "{log}");
    assert!(agent.process().terminate(Duration::from_secs(3))?.success());
    Ok(())
}
