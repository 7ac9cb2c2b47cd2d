//! What user space loads, on the kernel that runs: taken by the verifier, far from its limit, attached to an interface.
//!
//! `cargo xtask test --kernels` runs this on Debian's kernels too, and reads the lines that begin with `verified:`.

use std::path::{Path, PathBuf};

use aya::programs::{ProgramInfo, loaded_programs};
use necp_ebpf::abi::{DEFAULT_EXCEPTIONS, DEFAULT_FLOW_BUCKETS, DEFAULT_SLOTS, Stage, exception_records};
use necp_tests::{cleanup, netns::Namespace};
use necp_user::plane::{AttachMode, AttachedMode, Plane, PlaneConfig, decap::Decap};

/// Most instructions that the verifier may have to follow; its own limit is a million.
const MOST: u32 = 500_000;

#[test]
fn the_kernel_takes_the_program_as_the_daemon_loads_it_and_is_far_from_its_limit() {
    let bed = Bed::new();
    let config = PlaneConfig {
        pin: bed.pin.clone(),
        interfaces: vec!["v0".into()],
        mode: AttachMode::Native,
        slots: DEFAULT_SLOTS,
        flow_buckets: DEFAULT_FLOW_BUCKETS,
        exceptions: exception_records(DEFAULT_EXCEPTIONS),
        replies: true,
        intercepts: true,
        intercepts6: true,
    };
    let before: Vec<u32> = loaded_programs().flatten().map(|program| program.id()).collect();
    let plane = bed.ns.run(|| Plane::open(&config)).unwrap_or_else(|error| panic!("{error}"));
    assert!(plane.ports().iter().all(|port| port.mode == AttachedMode::Native), "{:?}", plane.ports());
    // What the interface's program hands over to is on no interface itself.
    let fresh = || loaded_programs().flatten().filter(|program| !before.contains(&program.id()));
    let handed = Stage::ALL.map(|stage| {
        let program = fresh().find(|program| program.name_as_str() == Some(stage.program()));
        verified(&program.unwrap_or_else(|| panic!("no program {}", stage.program())))
    });
    let own = bed.verified("v0");
    plane.close(false).unwrap();
    for count in handed.into_iter().chain([own]) {
        assert!((1..MOST).contains(&count), "{count} instructions, more than {MOST}");
    }
}

#[test]
fn the_kernel_takes_the_program_that_unwraps_gre_as_the_agent_loads_it() {
    let bed = Bed::new();
    let decap = bed.ns.run(|| Decap::attach(&bed.pin, vec!["v0".into()], &[[10, 0, 0, 1].into()]));
    let decap = decap.unwrap_or_else(|error| panic!("{error}"));
    let count = bed.verified("v0");
    decap.remove().unwrap();
    assert!((1..MOST).contains(&count), "{count} instructions, more than {MOST}");
}

/// A namespace with a veth pair, and a place for pins.
struct Bed {
    ns: Namespace,
    pin: PathBuf,
}

impl Bed {
    fn new() -> Self {
        let name = cleanup::fresh_name();
        let ns = Namespace::create(&name, "ne").expect("namespaces need root");
        ns.ip_batch("link add v0 type veth peer name v1\nlink set v0 up\nlink set v1 up\n").unwrap();
        Self { ns, pin: Path::new("/sys/fs/bpf").join(name) }
    }

    /// How many instructions of the program on an interface the verifier followed.
    fn verified(&self, interface: &str) -> u32 {
        let output = self.ns.command("ip").args(["-json", "link", "show", interface]).output().unwrap();
        let links: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let id = links[0]["xdp"]["prog"]["id"].as_u64().unwrap_or_else(|| panic!("no program on {interface}: {links}"));
        verified(&loaded_programs().flatten().find(|program| u64::from(program.id()) == id).expect("that program"))
    }
}

fn verified(program: &ProgramInfo) -> u32 {
    let count = program.verified_instruction_count().expect("the kernel tells since 5.16");
    println!("\nverified: {}: {count} instructions", program.name_as_str().unwrap_or("?"));
    count
}
