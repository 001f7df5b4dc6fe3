//! What the guests are made of.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use migrate_test_hosts::files::{self, Keys};
use migrate_test_hosts::{
    HostName, INTERFACE, PREFIX_BITS_V4, PREFIX_BITS_V6, WORKLOAD_V4, WORKLOAD_V6,
};

use crate::agent::{SETUP_FILE, SYSTEMD, Setup};
use crate::error::{Attempt, Error, Result};
use crate::initramfs::Archive;
use crate::kernels::{Fetched, with_dependencies};

/// A program that was built here and goes to every guest, on root's path.
#[derive(Clone, Debug)]
pub struct Program {
    /// Where it is on this machine.
    pub path: PathBuf,
    /// Its name in the guest.
    pub name: String,
}

/// What `scripts/setup` installs: no guest comes up without.
const PROGRAMS: [&str; 41] = [
    "sh", "bash", "cat", "chmod", "cp", "cut", "date", "dd", "df", "dmesg", "echo", "env", "false",
    "find", "grep", "head", "ip", "kill", "kmod", "ln", "ls", "mkdir", "mount", "mv", "ps", "rm",
    "sed", "setsid", "sleep", "sort", "ss", "ssh", "sshd", "sysctl", "tail", "tee", "touch",
    "true", "sync", "uname", "wc",
];
/// What the tests move, and how a kernel is left; a guest comes up without.
const WORKLOADS: [&str; 8] = [
    "busybox",
    "redis-server",
    "redis-cli",
    "redis-benchmark",
    "memcached",
    "openvpn",
    "kexec",
    "tc",
];
/// Devices, and what sockets, the gate and CRIU ask the kernel for.
const MODULES: [&str; 32] = [
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "failover",
    "net_failover",
    "af_packet",
    "tun",
    "veth",
    "bridge",
    "8021q",
    "bonding",
    "sch_ingress",
    "cls_bpf",
    "inet_diag",
    "tcp_diag",
    "udp_diag",
    "raw_diag",
    "unix_diag",
    "netlink_diag",
    "af_packet_diag",
    "nf_tables",
    "nft_compat",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nft_ct",
    "ip_tables",
    "iptable_filter",
    "xt_mark",
    "xt_tcpudp",
    "overlay",
];
/// Lists that `modprobe` reads.
const MODULE_LISTS: [&str; 10] = [
    "modules.dep",
    "modules.dep.bin",
    "modules.alias",
    "modules.alias.bin",
    "modules.softdep",
    "modules.symbols.bin",
    "modules.builtin",
    "modules.builtin.bin",
    "modules.builtin.alias.bin",
    "modules.builtin.modinfo",
];
/// Of systemd: what a boot with a network takes. Its units are all there, and fail where their
/// programs are not.
const SYSTEMD_PROGRAMS: [&str; 12] = [
    SYSTEMD,
    "/usr/lib/systemd/systemd-journald",
    "/usr/lib/systemd/systemd-modules-load",
    "/usr/lib/systemd/systemd-networkd",
    "/usr/lib/systemd/systemd-networkd-wait-online",
    "/usr/lib/systemd/system-generators/systemd-fstab-generator",
    "/usr/lib/systemd/systemd-shutdown",
    "/usr/lib/systemd/systemd-sysctl",
    "/usr/bin/journalctl",
    "/usr/bin/systemctl",
    "/usr/bin/systemd-tmpfiles",
    "/usr/bin/udevadm",
];
/// What installs a package there, and puts processes into scopes; a guest comes up without.
const SYSTEMD_TOOLS: [&str; 10] = [
    "diff",
    "dpkg",
    "dpkg-deb",
    "dpkg-query",
    "dpkg-split",
    "ldconfig",
    "start-stop-daemon",
    "systemd-notify",
    "systemd-run",
    "tar",
];
/// Of systemd 254 and newer.
const SYSTEMD_EXECUTOR: &str = "/usr/lib/systemd/systemd-executor";
/// What the units are in, and the rules of devices.
const SYSTEMD_TREES: [&str; 4] = [
    "/usr/lib/systemd/network",
    "/usr/lib/systemd/system",
    "/usr/lib/tmpfiles.d",
    "/usr/lib/udev/rules.d",
];
/// Units that nobody waits for here, and that need more than the guests have.
const SYSTEMD_MASKED: [&str; 12] = [
    "dbus.service",
    "dbus.socket",
    "getty.target",
    "proc-sys-fs-binfmt_misc.automount",
    "systemd-ask-password-wall.path",
    "systemd-logind.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-sysusers.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
];
/// The private place of a CRIU that `scripts/setup` fetched.
const OWN_CRIU: &str = "/opt/migrate/criu/bin/criu";

/// Why virtual machines cannot be had here; `None` when they can.
#[must_use]
pub fn lacking() -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return Some("virtual machines are made for x86-64 only".to_owned());
    }
    let on_path = |name: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .chain(["/usr/sbin".into(), "/sbin".into()])
            .any(|directory| directory.join(name).is_file())
    };
    if !crate::kernels::qemu().is_file() {
        return Some("needs QEMU: run scripts/vms".to_owned());
    }
    ["kmod", "strip", "ldd", "mkfs.ext4", "ssh-keygen", "sshd"]
        .into_iter()
        .find(|name| !on_path(name))
        .map(|name| format!("needs {name}: run scripts/setup"))
}

/// The part that all guests of a set share.
pub(crate) fn common(path: &Path, programs: &[Program]) -> Result<()> {
    let mut archive = Archive::create(path)?;
    archive.skeleton()?;
    for name in PROGRAMS {
        archive.program(name)?;
    }
    for name in WORKLOADS {
        match archive.program(name) {
            Err(Error::MissingProgram { .. }) | Ok(()) => {}
            Err(error) => return Err(error),
        }
    }
    archive.link("/usr/sbin/modprobe", Path::new("../bin/kmod"))?;
    for name in ["insmod", "lsmod"] {
        archive.link(format!("/usr/sbin/{name}"), Path::new("../bin/kmod"))?;
    }
    let init = std::env::current_exe().attempt(|| "find this executable".to_owned())?;
    archive.built(&init, Path::new("/init"))?;
    for program in programs {
        let to = Path::new(files::TOOLS).join(&program.name);
        archive.built(&program.path, &to)?;
    }
    criu(&mut archive)?;
    for (name, text) in [
        (
            "passwd",
            "root:x:0:0:root:/root:/bin/bash\nsshd:x:100:65534::/run/sshd:/usr/sbin/nologin\nmemcache:x:101:65534::/:/usr/sbin/nologin\nredis:x:103:103::/:/usr/sbin/nologin\nsystemd-network:x:102:102::/:/usr/sbin/nologin\nnobody:x:65534:65534::/:/usr/sbin/nologin\n",
        ),
        (
            "group",
            "root:x:0:\ntty:x:5:\nsystemd-network:x:102:\nredis:x:103:\nnogroup:x:65534:\n",
        ),
        ("shadow", "root:*:19000:0:99999:7:::\n"),
        (
            "nsswitch.conf",
            "passwd: files\ngroup: files\nshadow: files\nhosts: files\n",
        ),
        ("hosts", &files::hosts()),
    ] {
        archive.file(Path::new("/etc").join(name), 0o644, text.as_bytes())?;
    }
    archive.finish()
}

fn criu(archive: &mut Archive) -> Result<()> {
    let named = std::env::var_os("MIGRATE_CRIU").map(PathBuf::from);
    let path = named.unwrap_or_else(|| OWN_CRIU.into());
    let Ok(real) = path.canonicalize() else {
        // The guests do without, and what needs it says so.
        return Ok(());
    };
    // One that `scripts/setup` fetched has its loader and libraries beside it.
    let own = real.ancestors().find(|path| path.ends_with("root"));
    match own.filter(|own| own.join("usr/lib").is_dir()) {
        Some(own) => archive.tree(&own.join("usr/lib"))?,
        None => archive.libraries(&real)?,
    }
    archive.copy_to(&real, &real)?;
    if path != real {
        archive.link(&path, &real)?;
    }
    Ok(())
}

/// The part that belongs to one kernel.
pub(crate) fn modules(path: &Path, kernel: &Fetched) -> Result<()> {
    let mut archive = Archive::create(path)?;
    let to = Path::new("/usr/lib/modules").join(&kernel.release);
    for name in MODULE_LISTS {
        let from = kernel.modules.join(name);
        if from.is_file() {
            archive.copy_to(&from, &to.join(name))?;
        }
    }
    let read = || format!("read the modules of {}", kernel.release);
    for file in with_dependencies(&kernel.modules, &MODULES).attempt(read)? {
        archive.copy_to(&kernel.modules.join(&file), &to.join(&file))?;
    }
    archive.finish()
}

/// What a guest whose PID 1 is systemd has besides, with its network.
pub(crate) fn systemd(path: &Path, host: HostName, programs: &[Program]) -> Result<()> {
    let mut archive = Archive::create(path)?;
    for Program { name, .. } in programs {
        // Where units expect what was installed by hand.
        let installed = Path::new("/usr/local/bin").join(name);
        archive.link(installed, &Path::new(files::TOOLS).join(name))?;
    }
    let executor = Some(SYSTEMD_EXECUTOR).filter(|path| Path::new(path).is_file());
    for program in SYSTEMD_PROGRAMS.into_iter().chain(executor) {
        let program = Path::new(program);
        archive.libraries(program)?;
        archive.copy(program)?;
    }
    for name in SYSTEMD_TOOLS {
        match archive.program(name) {
            Err(Error::MissingProgram { .. }) | Ok(()) => {}
            Err(error) => return Err(error),
        }
    }
    archive.link(
        "/usr/lib/systemd/systemd-udevd",
        Path::new("/usr/bin/udevadm"),
    )?;
    for tree in SYSTEMD_TREES {
        archive.tree(Path::new(tree))?;
    }
    let units = Path::new("/etc/systemd/system");
    for unit in SYSTEMD_MASKED {
        archive.link(units.join(unit), Path::new("/dev/null"))?;
    }
    let system = Path::new("/usr/lib/systemd/system");
    for (of, unit) in [
        ("multi-user.target", "systemd-networkd.service"),
        (
            "network-online.target",
            "systemd-networkd-wait-online.service",
        ),
    ] {
        let link = units.join(format!("{of}.wants")).join(unit);
        archive.link(link, &system.join(unit))?;
    }
    archive.link(
        units.join("default.target"),
        &system.join("multi-user.target"),
    )?;
    let mut network = format!("[Match]\nName={INTERFACE}\n[Network]\nIPv6AcceptRA=no\n");
    for (address, bits) in addresses(host) {
        let _ = writeln!(
            network,
            "[Address]\nAddress={address}/{bits}\nDuplicateAddressDetection=none"
        );
    }
    let file = format!("/etc/systemd/network/{INTERFACE}.network");
    archive.file(file, 0o644, network.as_bytes())?;
    archive.finish()
}

/// A host's addresses, in the order in which it gets them: its own IPv6 address comes last, its own
/// IPv4 address first, which makes them the sources of the host's own connections.
fn addresses(host: HostName) -> Vec<(IpAddr, u8)> {
    let owns_workload = host == HostName::Host1;
    let workload = |address: IpAddr| owns_workload.then_some(address);
    let v4 = [Some(host.ipv4().into()), workload(WORKLOAD_V4.into())];
    let v6 = [workload(WORKLOAD_V6.into()), Some(host.ipv6().into())];
    let v4 = v4.into_iter().flatten().map(|ip| (ip, PREFIX_BITS_V4));
    let v6 = v6.into_iter().flatten().map(|ip| (ip, PREFIX_BITS_V6));
    v4.chain(v6).collect()
}

/// The part that belongs to one guest.
pub(crate) fn own(
    path: &Path,
    host: HostName,
    keys: &Keys,
    disk: bool,
    systemd: bool,
) -> Result<()> {
    let mut archive = Archive::create(path)?;
    let mut network = "link set lo up\n".to_owned();
    for (address, bits) in addresses(host) {
        let nodad = if address.is_ipv6() { " nodad" } else { "" };
        let _ = writeln!(network, "addr add {address}/{bits} dev {INTERFACE}{nodad}");
    }
    let _ = writeln!(network, "link set {INTERFACE} up");
    let setup = Setup {
        hostname: host.as_str().to_owned(),
        modules: MODULES.map(str::to_owned).to_vec(),
        network,
        last_pid: host.last_pid(),
        sshd: host.has_sshd(),
        disk,
        systemd,
    };
    let setup = serde_json::to_vec(&setup).attempt(|| format!("write {SETUP_FILE}"))?;
    archive.file(SETUP_FILE, 0o644, &setup)?;
    archive.file("/etc/hostname", 0o644, format!("{host}\n").as_bytes())?;
    // The same on whatever kernel it boots, as on any machine.
    let machine_id = format!("{:032x}\n", host.ipv4().to_bits());
    archive.file("/etc/machine-id", 0o444, machine_id.as_bytes())?;
    let known_hosts = files::known_hosts(keys).map_err(Error::Keys)?;
    archive.file("/etc/ssh/ssh_config", 0o644, files::SSH_CONFIG.as_bytes())?;
    archive.file("/etc/ssh/ssh_known_hosts", 0o644, known_hosts.as_bytes())?;
    let public = keys.public("root").map_err(Error::Keys)?;
    archive.file("/etc/ssh/authorized_keys", 0o644, public.as_bytes())?;
    let private = keys.private("root").map_err(Error::Keys)?;
    archive.file("/etc/ssh/root_key", 0o600, private.as_bytes())?;
    if host.has_sshd() {
        let criu = std::env::var("MIGRATE_CRIU").ok();
        let config = files::sshd_config(criu.as_deref());
        archive.file("/etc/ssh/sshd_config", 0o644, config.as_bytes())?;
        let key = keys.private(host.as_str()).map_err(Error::Keys)?;
        archive.file("/etc/ssh/ssh_host_ed25519_key", 0o600, key.as_bytes())?;
    }
    archive.finish()
}
