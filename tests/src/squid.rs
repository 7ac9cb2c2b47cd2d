//! A real interception proxy: Debian's squid, which the host's own nftables redirect connections to.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use necp_user::necp::message::Family;

use crate::{netns::Namespace, process::Process, topology::Topology};

/// Where squid takes what was redirected.
const INTERCEPT: u16 = 3129;
/// It wants a port for clients that know of it, too.
const FORWARD: u16 = 3128;

/// A running squid that keeps nothing. What it passes on carries its name in `Via`. Dropping it ends it.
#[derive(Debug)]
pub struct Squid {
    process: Process,
    service: String,
}

impl Squid {
    /// Starts it, and redirects to it what of one family comes in by `eth0` for this TCP port, whatever the address.
    ///
    /// # Errors
    /// With squid's output or nft's, if it does not come up.
    pub fn start(topology: &Topology, ns: &Namespace, name: &str, family: Family, port: u16) -> Result<Self> {
        let config = topology.dir().join(format!("squid-{name}.conf"));
        let (any, table) = match family {
            Family::V4 => ("0.0.0.0", "ip"),
            Family::V6 => ("[::]", "ip6"),
        };
        fs::write(&config, configuration(name, any))?;
        // What names its shared memory, of letters and digits only.
        let service: String =
            format!("{}{name}", topology.name()).chars().filter(char::is_ascii_alphanumeric).collect();
        let mut command = ns.command("squid");
        command.args(["-N", "-d", "1", "-n", &service, "-f"]).arg(&config);
        let process = Process::spawn(command, &format!("squid-{name}"), topology.dir())?;
        let mut squid = Self { process, service };
        squid.process.wait_until("squid listens", Duration::from_secs(10), |_| ns.listens(INTERCEPT))?;
        let rules = format!(
            "table {table} proxy {{ chain in {{ type nat hook prerouting priority dstnat; \
             iifname \"eth0\" tcp dport {port} redirect to :{INTERCEPT}; }}; }}"
        );
        let output = ns.command("nft").arg(rules).output().context("nft does not start")?;
        ensure!(output.status.success(), "nft: {}", String::from_utf8_lossy(&output.stderr));
        Ok(squid)
    }
}

impl Drop for Squid {
    fn drop(&mut self) {
        // It removes its shared memory itself, if it is given the time.
        if self.process.terminate(Duration::from_secs(5)).is_err() {
            self.process.kill();
            for part in ["metadata", "queues", "readers"] {
                let _ = fs::remove_file(PathBuf::from(format!("/dev/shm/{}-cf__{part}.shm", self.service)));
            }
        }
    }
}

fn configuration(name: &str, any: &str) -> String {
    format!(
        "http_port {any}:{INTERCEPT} intercept
http_port {any}:{FORWARD}
visible_hostname {name}
pid_filename none
cache_log /dev/null
access_log none
cache deny all
cache_mem 8 MB
coredump_dir none
netdb_filename none
pinger_enable off
http_access allow all
dns_nameservers 127.0.0.1
shutdown_lifetime 0 seconds
"
    )
}
