//! Hosts in namespaces, joined by veth pairs and bridges in a switch namespace.
//!
//! One interface (the default): client, NE and servers share one link, so that servers may answer clients directly.
//! ```text
//!  client 198.18.0.2 ─┐                     ┌─ s1 10.0.0.11, VIP on lo
//!                     ├─ br0 in `switch` ───┼─ s2 10.0.0.12
//!  NE 10.0.0.1 ───────┘                     └─ …
//! ```
//! Two interfaces: the NE stands between two links; the servers' answers go back through the switch, which routes.
//! ```text
//!  client ── br0 ── eth0 NE eth1 ── br1 ── s1, s2, …
//!             └──────── switch ──────┘   198.18.255.254, 10.0.0.254
//! ```
//! Clients find a VIP on their link, by ARP, as an NE announces it. Client addresses are all of 198.18.0.0/17 at once.
//!
//! A bed may have IPv6 besides: the NE is [`NE6`] for the servers, clients come from [`CLIENT6`] and look for [`VIP6`] by neighbour
//! discovery on their link.

use std::{
    fmt::Write as _,
    net::{Ipv4Addr, Ipv6Addr},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    cleanup::{self, WorkDir},
    link::{self, Offload},
    netns::Namespace,
    xdp::{self, Attached},
};

/// The VIP of every bed that names no other.
pub const VIP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// The NE on the servers' link.
pub const NE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// The NE on the clients' link, in a bed with two interfaces.
pub const NE_CLIENT_SIDE: Ipv4Addr = Ipv4Addr::new(198, 18, 128, 1);
/// The IPv6 VIP of a bed with IPv6.
pub const VIP6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 0x10);
/// The NE's IPv6 address.
pub const NE6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, 1);
/// The NE on the clients' link, in a bed with two interfaces and IPv6.
pub const NE6_CLIENT_SIDE: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 1);
/// The client's IPv6 address.
pub const CLIENT6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xc, 0, 0, 0, 0, 2);
/// Client addresses that can be used: [`client_address`] takes numbers below this.
pub const CLIENT_ADDRESSES: usize = 32_000;

const SWITCH_SERVER_SIDE: &str = "10.0.0.254";
const SWITCH_CLIENT_SIDE: &str = "198.18.255.254";
const SWITCH6_SERVER_SIDE: &str = "2001:db8:a::fe";
const SWITCH6_CLIENT_SIDE: &str = "2001:db8:c::fe";
const CLIENTS6: &str = "2001:db8:c::/64";
const SERVERS6: &str = "2001:db8:a::/64";
const MAX_SERVERS: usize = 200;

/// The `index`-th address that a client may connect from: 198.18.0.2, 198.18.0.3, …
///
/// # Panics
/// Past [`CLIENT_ADDRESSES`].
pub fn client_address(index: usize) -> Ipv4Addr {
    assert!(index < CLIENT_ADDRESSES, "there are {CLIENT_ADDRESSES} client addresses");
    let [high, low] = [(index / 250) as u8, (index % 250) as u8 + 2];
    Ipv4Addr::new(198, 18, high, low)
}

/// The address of the server with this index (0 is s1): 10.0.0.11, 10.0.0.12, …
///
/// # Panics
/// Past the 200th.
pub fn server_address(index: usize) -> Ipv4Addr {
    assert!(index < MAX_SERVERS, "there are at most {MAX_SERVERS} servers");
    Ipv4Addr::new(10, 0, 0, index as u8 + 11)
}

/// The IPv6 address of the server with this index: 2001:db8:a::11, 2001:db8:a::12, …
pub fn server_address6(index: usize) -> Ipv6Addr {
    let last = format!("{}", index + 11);
    Ipv6Addr::new(0x2001, 0xdb8, 0xa, 0, 0, 0, 0, u16::from_str_radix(&last, 16).expect("decimal digits"))
}

/// What to build.
#[derive(Clone, Debug)]
pub struct Builder {
    servers: usize,
    vips: Vec<Ipv4Addr>,
    vip_on_servers: bool,
    two_interfaces: bool,
    ipv6: bool,
}

impl Builder {
    /// How many servers (1 to 200; 3 unless told).
    pub fn servers(mut self, count: usize) -> Self {
        self.servers = count;
        self
    }

    /// The VIPs that clients reach on their link ([`VIP`] unless told).
    pub fn vips(mut self, vips: &[Ipv4Addr]) -> Self {
        self.vips = vips.to_vec();
        self
    }

    /// Do the servers have the VIPs on `lo` from the start (yes unless told)? An agent may be what is to put them there.
    pub fn vip_on_servers(mut self, yes: bool) -> Self {
        self.vip_on_servers = yes;
        self
    }

    /// Gives the NE `eth0` towards the clients and `eth1` towards the servers.
    pub fn two_interfaces(mut self) -> Self {
        self.two_interfaces = true;
        self
    }

    /// Gives all hosts IPv6 too.
    pub fn ipv6(mut self) -> Self {
        self.ipv6 = true;
        self
    }

    /// Builds it.
    ///
    /// # Errors
    /// Without root or `ip`; what was built is gone then.
    pub fn build(self) -> Result<Topology> {
        ensure!((1..=MAX_SERVERS).contains(&self.servers), "a bed has 1 to {MAX_SERVERS} servers");
        let name = cleanup::fresh_name();
        let work_dir = WorkDir::new(&name).context("no directory for the bed's files")?;
        let create = |role: &str| {
            let namespace = Namespace::create(&name, role)?;
            // Tests count packets: no neighbour discovery among them, unless they are about it.
            let off = if self.ipv6 { "0" } else { "1" };
            namespace.sysctl(&[
                ("net/ipv6/conf/all/disable_ipv6", off),
                ("net/ipv6/conf/default/disable_ipv6", off),
                ("net/ipv6/conf/default/accept_dad", "0"),
                ("net/ipv6/conf/default/accept_ra", "0"),
                ("net/ipv4/conf/all/rp_filter", "0"),
                ("net/ipv4/conf/default/rp_filter", "0"),
                ("net/ipv4/conf/all/send_redirects", "0"),
                ("net/ipv4/conf/default/send_redirects", "0"),
            ])?;
            Ok::<_, anyhow::Error>(namespace)
        };
        let switch = create("switch")?;
        let client = create("client")?;
        let ne = create("ne")?;
        let servers = (0..self.servers).map(|index| {
            let name = format!("s{}", index + 1);
            Ok(Server {
                ns: create(&name)?,
                switch: switch.clone(),
                port: name.clone(),
                name,
                address: server_address(index),
            })
        });
        let servers = servers.collect::<Result<Vec<_>>>()?;
        let mut topology = Topology {
            client,
            ne,
            servers,
            switch,
            two_interfaces: self.two_interfaces,
            vips: self.vips.clone(),
            receivers: Vec::new(),
            work_dir,
            name,
        };
        topology.plug()?;
        topology.address(&self)?;
        if self.ipv6 {
            topology.address6(self.vip_on_servers)?;
        }
        Ok(topology)
    }
}

/// A bed: it goes when dropped, after what runs in it.
#[derive(Debug)]
pub struct Topology {
    client: Namespace,
    ne: Namespace,
    servers: Vec<Server>,
    switch: Namespace,
    two_interfaces: bool,
    vips: Vec<Ipv4Addr>,
    /// At the switch's end of each of the NE's cables. A veth takes in what its peer transmits by XDP at once only if it
    /// has a program itself: with receive offload alone XDP_TX fills the ring, but wakes nobody.
    receivers: Vec<Attached>,
    work_dir: WorkDir,
    name: String,
}

impl Topology {
    /// One interface, three servers, one VIP, unless told otherwise.
    pub fn builder() -> Builder {
        Builder { servers: 3, vips: vec![VIP], vip_on_servers: true, two_interfaces: false, ipv6: false }
    }

    /// The bed's name, which no other bed has.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The clients' host; its interface is `eth0`.
    pub fn client(&self) -> &Namespace {
        &self.client
    }

    /// The balancer's host.
    pub fn ne(&self) -> &Namespace {
        &self.ne
    }

    /// The balancer's interfaces.
    pub fn ne_interfaces(&self) -> &'static [&'static str] {
        if self.two_interfaces { &["eth0", "eth1"] } else { &["eth0"] }
    }

    /// The switch, whose ports are `c0`, `ne0`, `ne1` and each server's name.
    pub fn switch(&self) -> &Namespace {
        &self.switch
    }

    /// The VIPs.
    pub fn vips(&self) -> &[Ipv4Addr] {
        &self.vips
    }

    /// All servers.
    pub fn servers(&self) -> &[Server] {
        &self.servers
    }

    /// The server with this index: 0 is s1.
    pub fn server(&self, index: usize) -> &Server {
        &self.servers[index]
    }

    /// A directory for files of this bed, logs among them.
    pub fn dir(&self) -> &Path {
        self.work_dir.path()
    }

    /// A pin directory of this bed's own.
    pub fn pins(&self) -> &Path {
        self.work_dir.pins()
    }

    /// Pings every server and the NE from the client.
    ///
    /// # Errors
    /// Names the first host that does not answer.
    pub fn check(&self) -> Result<()> {
        let hosts = self.servers.iter().map(|server| server.address).chain([NE]);
        hosts.into_iter().try_for_each(|host| link::ping(&self.client, host, Duration::from_secs(2)).map(drop))
    }

    /// Cables: one batch in the switch, then the offloads at both ends.
    fn plug(&mut self) -> Result<()> {
        let server_bridge = if self.two_interfaces { "br1" } else { "br0" };
        let mut cables = vec![("c0", "eth0", &self.client, "br0"), ("ne0", "eth0", &self.ne, "br0")];
        if self.two_interfaces {
            cables.push(("ne1", "eth1", &self.ne, "br1"));
        }
        cables.extend(self.servers.iter().map(|server| (server.port.as_str(), "eth0", &server.ns, server_bridge)));

        let mut batch = String::new();
        for bridge in if self.two_interfaces { &["br0", "br1"][..] } else { &["br0"] } {
            writeln!(batch, "link add {bridge} up type bridge stp_state 0 forward_delay 0 mcast_snooping 0")?;
        }
        for (port, interface, host, bridge) in &cables {
            writeln!(batch, "link add {port} type veth peer name {interface} netns {}", host.name())?;
            writeln!(batch, "link set {port} master {bridge} up")?;
        }
        self.switch.ip_batch(&batch)?;
        for (port, interface, host, _) in cables {
            link::set_offload(&self.switch, port, Offload::TxChecksum, false)?;
            link::set_offload(host, interface, Offload::TxChecksum, false)?;
            if port.starts_with("ne") {
                self.receivers.push(xdp::attach(&self.switch, port, xdp::Action::Pass)?);
            }
        }
        Ok(())
    }

    fn address(&self, builder: &Builder) -> Result<()> {
        // All of 198.18.0.0/17 is local to the client; the other half of the /16 holds its neighbours.
        let mut client = format!("addr add {}/16 dev eth0\nlink set eth0 up\n", client_address(0));
        writeln!(client, "route add local 198.18.0.0/17 dev lo")?;
        for vip in &self.vips {
            writeln!(client, "route add {vip}/32 dev eth0")?;
        }
        let mut ne = String::new();
        let server_route = if self.two_interfaces {
            self.switch.ip_batch(&format!(
                "addr add {SWITCH_CLIENT_SIDE}/16 dev br0\naddr add {SWITCH_SERVER_SIDE}/24 dev br1\n"
            ))?;
            self.switch.sysctl(&[("net/ipv4/ip_forward", "1")])?;
            self.ne.sysctl(&[("net/ipv4/ip_forward", "1")])?;
            writeln!(client, "route add 10.0.0.0/24 via {SWITCH_CLIENT_SIDE}")?;
            writeln!(ne, "addr add {NE_CLIENT_SIDE}/16 dev eth0\nlink set eth0 up")?;
            writeln!(ne, "addr add {NE}/24 dev eth1\nlink set eth1 up")?;
            format!("route add 198.18.0.0/16 via {SWITCH_SERVER_SIDE}")
        } else {
            writeln!(client, "route add 10.0.0.0/24 dev eth0")?;
            writeln!(ne, "addr add {NE}/24 dev eth0\nlink set eth0 up\nroute add 198.18.0.0/16 dev eth0")?;
            "route add 198.18.0.0/16 dev eth0".to_owned()
        };
        self.client.ip_batch(&client)?;
        // Thousands of short connections leave thousands of TIME-WAITs.
        self.client.sysctl(&[("net/ipv4/ip_local_port_range", "1024 65535"), ("net/ipv4/tcp_tw_reuse", "1")])?;
        self.ne.ip_batch(&ne)?;
        self.servers.iter().try_for_each(|server| server.address(builder, &server_route))
    }

    fn address6(&self, vip_on_servers: bool) -> Result<()> {
        let mut client = format!("addr add {CLIENT6}/64 dev eth0\nroute add {VIP6} dev eth0\n");
        let clients = if self.two_interfaces {
            self.switch.ip_batch(&format!(
                "addr add {SWITCH6_CLIENT_SIDE}/64 dev br0\naddr add {SWITCH6_SERVER_SIDE}/64 dev br1\n"
            ))?;
            self.switch.sysctl(&[("net/ipv6/conf/all/forwarding", "1")])?;
            self.ne.sysctl(&[("net/ipv6/conf/all/forwarding", "1")])?;
            writeln!(client, "route add {SERVERS6} via {SWITCH6_CLIENT_SIDE}")?;
            self.ne.ip_batch(&format!("addr add {NE6_CLIENT_SIDE}/64 dev eth0\naddr add {NE6}/64 dev eth1\n"))?;
            format!("route add {CLIENTS6} via {SWITCH6_SERVER_SIDE}")
        } else {
            writeln!(client, "route add {SERVERS6} dev eth0")?;
            self.ne.ip_batch(&format!("addr add {NE6}/64 dev eth0\nroute add {CLIENTS6} dev eth0\n"))?;
            format!("route add {CLIENTS6} dev eth0")
        };
        self.client.ip_batch(&client)?;
        for (index, server) in self.servers.iter().enumerate() {
            let vip = if vip_on_servers { format!("addr add {VIP6}/128 dev lo\n") } else { String::new() };
            let own = server_address6(index);
            server.ns.ip_batch(&format!("addr add {own}/64 dev eth0\n{clients}\n{vip}"))?;
        }
        Ok(())
    }
}

/// A server's host; its interface is `eth0`.
#[derive(Debug)]
pub struct Server {
    ns: Namespace,
    switch: Namespace,
    port: String,
    name: String,
    address: Ipv4Addr,
}

impl Server {
    /// Its namespace.
    pub fn ns(&self) -> &Namespace {
        &self.ns
    }

    /// `s1`, `s2`, …
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its own address.
    pub fn ip(&self) -> Ipv4Addr {
        self.address
    }

    /// The hardware address of its `eth0`.
    ///
    /// # Errors
    /// If the interface is gone.
    pub fn mac(&self) -> Result<[u8; 6]> {
        link::mac(&self.ns, "eth0")
    }

    /// Gives its `eth0` another hardware address, as a replaced card or a moved virtual machine would.
    ///
    /// # Errors
    /// If the kernel refuses, e.g. a multicast address.
    pub fn set_mac(&self, mac: [u8; 6]) -> Result<()> {
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        self.ns.ip_batch(&format!("link set eth0 address {mac}\n"))
    }

    /// Takes the cable out at the switch: the server's addresses and routes stay.
    ///
    /// # Errors
    /// If the port is gone.
    pub fn unplug(&self) -> Result<()> {
        self.switch.ip_batch(&format!("link set {} down\n", self.port))
    }

    /// Puts the cable back.
    ///
    /// # Errors
    /// If the port is gone.
    pub fn plug(&self) -> Result<()> {
        self.switch.ip_batch(&format!("link set {} up\n", self.port))
    }

    fn address(&self, builder: &Builder, route: &str) -> Result<()> {
        // The VIP is on every server, and only the NE may answer for it.
        self.ns.sysctl(&[("net/ipv4/conf/all/arp_ignore", "1"), ("net/ipv4/conf/all/arp_announce", "2")])?;
        let mut batch = format!("addr add {}/24 dev eth0\nlink set eth0 up\n{route}\n", self.address);
        for vip in builder.vips.iter().filter(|_| builder.vip_on_servers) {
            writeln!(batch, "addr add {vip}/32 dev lo")?;
        }
        self.ns.ip_batch(&batch)
    }
}
