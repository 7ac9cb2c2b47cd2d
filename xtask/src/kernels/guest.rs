//! A virtual machine that runs test programs and says on its serial line what came of them.

use std::{
    path::PathBuf,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

use super::{PROGRAMS, fetch::Kernel, image::Image};
use crate::host::Host;

/// What the guest itself says begins with this: `kernel RELEASE`, `note TEXT`, `failed WHAT`, `ended PROGRAM STATUS`.
pub const MARK: &str = "guest: ";
/// A test at a time, and what it prints.
pub const TEST_ARGS: [&str; 2] = ["--test-threads=1", "--nocapture"];

/// For the test bed's links, and a server whose kernel ends GRE itself.
const MODULES: [&str; 3] = ["drivers/net/veth", "net/bridge/bridge", "net/ipv4/ip_gre"];
/// Programs of this host that the tests start.
const TOOLS: [&str; 2] = ["busybox", "ip"];
/// Seconds after which a guest is given up.
const PATIENCE: &str = "1200";
/// In MiB: the maps of the daemon's defaults, twice over.
const MEMORY: &str = "2048";

/// The command that boots the kernel with the test programs and ends when they have.
pub fn boot(host: &Host, kernel: &Kernel, programs: &[PathBuf]) -> Result<Command> {
    let dir = host.target.join("kernels").join(format!("guest-{}", kernel.release));
    let mut image = Image::new(host, dir.clone())?;
    for tool in TOOLS {
        let file = host.which(tool).with_context(|| format!("there is no `{tool}`"))?;
        image.program(tool, &file)?;
    }
    for (file, (name, _)) in programs.iter().zip(PROGRAMS) {
        image.program(name, file)?;
    }
    image.program("necp", &host.binary("debug", "necp"))?;
    for module in MODULES {
        image.module(&kernel.modules, module)?;
    }
    let disk = dir.with_extension("cpio");
    let script = script(&image.load_modules());
    image.pack(&script, &disk)?;
    // Emulated: a machine that is itself virtual may have no KVM, or one that hangs.
    let mut qemu = host.command("timeout");
    qemu.args(["--kill-after=5", PATIENCE, "qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", MEMORY]);
    qemu.args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(disk);
    qemu.args(["-append", "console=ttyS0 quiet panic=-1"]).stderr(Stdio::inherit());
    Ok(qemu)
}

/// What runs first in the guest, and all that does.
fn script(load_modules: &str) -> String {
    let mut text = format!(
        "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t bpf bpf /sys/fs/bpf
mount -t tmpfs run /run
mount -t tmpfs tmp /tmp
echo \"{MARK}kernel $(uname -r)\"
{load_modules}/bin/ip link set lo up
if /bin/ip link add gretest type gre local 127.0.0.1 remote 127.0.0.2 && /bin/ip link del gretest
then echo '{MARK}note gre device: ok'
else echo '{MARK}failed this kernel makes no gre device'
fi
"
    );
    for (name, args) in PROGRAMS {
        let args: Vec<_> = args.iter().chain(&TEST_ARGS).copied().collect();
        text += &format!("/bin/{name} {} 2>&1\necho \"{MARK}ended {name} $?\"\n", args.join(" "));
    }
    text + "poweroff -f\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_runs_every_program_and_says_how_it_ended() {
        let script = script("insmod /modules/veth.ko\n");
        for (name, _) in PROGRAMS {
            assert!(script.contains(&format!("/bin/{name} ")) && script.contains(&format!("guest: ended {name} $?")));
        }
        assert!(script.starts_with("#!/bin/busybox sh\n") && script.ends_with("poweroff -f\n"), "{script}");
    }
}
