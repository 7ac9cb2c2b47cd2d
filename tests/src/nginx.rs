//! A real web server: Debian's nginx, one per server namespace, with nothing of the host's configuration.

use std::{fs, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

use crate::{netns::Namespace, process::Process, topology::Topology};

/// What `/big` serves: the same bytes on every server, so that a download's checksum says whether it is whole,
/// whoever answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// In bytes.
    pub length: u64,
    /// SHA-256 of all of them.
    pub sha256: [u8; 32],
    path: PathBuf,
}

impl Content {
    /// Writes a file of pseudo-random bytes into the bed's directory. No block repeats, so that a lost or doubled
    /// one shows.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn new(topology: &Topology, length: usize) -> Result<Self> {
        let path = topology.dir().join(format!("big-{length}"));
        // SplitMix64.
        let words = (1u64..).map(|n| {
            let n = n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
        });
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).take(length).collect();
        fs::write(&path, &bytes).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { length: length as u64, sha256: Sha256::digest(&bytes).into(), path })
    }
}

/// A running nginx. Its answers carry its name in `X-Server`:
/// - `/` and `/name`: the name and a line break;
/// - `/big`: [`Content`], at full speed; `/big?rate=200k`: at so many bytes per second.
#[derive(Debug)]
pub struct Nginx {
    process: Process,
}

impl Nginx {
    /// Starts it on these TCP ports of all addresses, and waits until it listens. Dropping it kills it, as SIGKILL would.
    ///
    /// # Errors
    /// With nginx's output, if it does not come up.
    pub fn start(topology: &Topology, ns: &Namespace, name: &str, ports: &[u16], content: &Content) -> Result<Self> {
        let dir = topology.dir().join(format!("nginx-{name}"));
        fs::create_dir_all(&dir)?;
        let config = dir.join("nginx.conf");
        fs::write(&config, configuration(name, ports, content, &dir.display().to_string()))?;
        let mut command = ns.command("nginx");
        command.arg("-c").arg(&config).arg("-p").arg(&dir).args(["-e", "stderr"]);
        let log = format!("nginx-{name}");
        let mut process = Process::spawn(command, &log, topology.dir())?;
        let listens = |_: &Process| ports.iter().all(|port| ns.listens(*port));
        process.wait_until("nginx listens", Duration::from_secs(5), listens)?;
        Ok(Self { process })
    }

    /// The process, to be killed or asked for its log.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }
}

fn configuration(name: &str, ports: &[u16], content: &Content, dir: &str) -> String {
    let listen: String =
        ports.iter().map(|port| format!("listen {port} backlog=4096; listen [::]:{port} backlog=4096; ")).collect();
    let big = content.path.display();
    // One process, so that killing it kills all of it. `sendfile` would keep pages of the file in the receiver's queue.
    format!(
        "daemon off;
master_process off;
user root;
pid {dir}/pid;
error_log stderr warn;
worker_rlimit_nofile 65536;
events {{ worker_connections 16384; }}
http {{
  access_log off;
  sendfile off;
  tcp_nodelay on;
  client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/proxy;
  fastcgi_temp_path {dir}/fastcgi;
  uwsgi_temp_path {dir}/uwsgi;
  scgi_temp_path {dir}/scgi;
  keepalive_timeout 1h;
  keepalive_requests 1000000000;
  default_type text/plain;
  map $arg_rate $rate {{ default 0; ~^(?<bytes>[0-9]+[km]?)$ $bytes; }}
  server {{
    {listen}
    add_header X-Server {name} always;
    location = / {{ return 200 \"{name}\\n\"; }}
    location = /name {{ return 200 \"{name}\\n\"; }}
    location = /big {{ alias {big}; limit_rate $rate; }}
  }}
}}
"
    )
}
