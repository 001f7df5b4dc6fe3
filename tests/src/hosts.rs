//! Questions about a test host, answered by its kernel and not by `migrate`.

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use aya::programs::SchedClassifier;
use aya::programs::tc::TcAttachType;
use migrate_test_hosts::{Host, INTERFACE};
use migrate_test_vms::Kernel;
use nix::sys::signal::Signal;

/// Between two looks at something that announces itself to nobody.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// Looks until `condition` holds; `false` when it never did within `limit`.
pub fn eventually(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if condition() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// Whether a process of this PID runs in the host; one that only waits to be
/// reaped does not.
#[must_use]
pub fn runs(host: &Host, pid: i32) -> bool {
    let stat = fs::read_to_string(host.path(format!("/proc/{pid}/stat"))).unwrap_or_default();
    // The state follows the name, which may hold anything but ends with `)`.
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Whether a process has a handler for a signal; before that the signal would
/// end it.
#[must_use]
pub fn catches(host: &Host, pid: i32, signal: Signal) -> bool {
    let status = fs::read_to_string(host.path(format!("/proc/{pid}/status"))).unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigCgt:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0);
    mask >> (signal as i32 - 1) & 1 == 1
}

/// The name of a process in the host, empty when there is none.
#[must_use]
pub fn process_name(host: &Host, pid: i32) -> String {
    let name = fs::read_to_string(host.path(format!("/proc/{pid}/comm"))).unwrap_or_default();
    name.trim_end().to_owned()
}

/// The process of this name on a host.
#[must_use]
pub fn named(host: &Host, name: &str) -> Option<i32> {
    let entries = fs::read_dir(host.path("/proc")).ok()?;
    entries.flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let comm = fs::read_to_string(entry.path().join("comm")).ok()?;
        (comm.trim_end() == name).then_some(pid)
    })
}

/// Whether something listens on a TCP port of the host. Opens no connection:
/// one of its own would be among those that move.
#[must_use]
pub fn listens(host: &Host, port: u16) -> bool {
    /// As the kernel prints `TCP_LISTEN`.
    const LISTEN: &str = "0A";
    let local = format!(":{port:04X}");
    ["tcp", "tcp6"].iter().any(|table| {
        let path = format!("/proc/{}/net/{table}", host.init_pid());
        let table = fs::read_to_string(path).unwrap_or_default();
        table.lines().any(|line| {
            let mut columns = line.split_whitespace().skip(1);
            let (address, state) = (columns.next(), columns.nth(1));
            address.is_some_and(|address| address.ends_with(&local)) && state == Some(LISTEN)
        })
    })
}

/// Whether an address is on the host's interface, by `ip`.
///
/// # Errors
///
/// When `ip` cannot be run there.
pub fn has_address(host: &Host, address: IpAddr) -> io::Result<bool> {
    let output = host
        .exec(["ip", "-o", "address", "show", "dev", INTERFACE])
        .map_err(io::Error::other)?;
    if !output.status.success() {
        return Err(io::Error::other(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        ));
    }
    let wanted = format!(" {address}/");
    Ok(String::from_utf8_lossy(&output.stdout).contains(&wanted))
}

/// The eBPF programs on the host's interfaces: `eth0 ingress: NAME`.
///
/// # Errors
///
/// When the host is gone or the kernel cannot be asked.
pub fn gates(host: &Host) -> io::Result<Vec<String>> {
    host.in_network(|| {
        let mut found = Vec::new();
        for interface in ["lo", INTERFACE] {
            for (way, name) in [
                (TcAttachType::Ingress, "ingress"),
                (TcAttachType::Egress, "egress"),
            ] {
                let (_, programs) =
                    SchedClassifier::query_tcx(interface, way).map_err(io::Error::other)?;
                let names = programs.iter().map(|program| {
                    let program = program.name_as_str().unwrap_or("?");
                    format!("{interface} {name}: {program}")
                });
                found.extend(names);
            }
        }
        Ok(found)
    })
    .map_err(io::Error::other)?
}

/// Established connections that a RST (or a timeout) ended on this host.
///
/// # Errors
///
/// When the host is gone.
pub fn reset_connections(host: &Host) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/{}/net/snmp", host.init_pid()))?;
    snmp(&text, "Tcp:", "EstabResets")
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no EstabResets"))
}

/// What a host's TCP has counted that no peer should have to bear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpCounts {
    /// Segments sent again, probes among them.
    pub retransmitted: u64,
    /// Probes: when nothing has come back for two round trips, Linux sends the
    /// last segment again or the next one. On a busy machine it does so all the
    /// time.
    pub probes: u64,
    /// Retransmission timers that ran out.
    pub timeouts: u64,
    /// RST segments sent.
    pub resets_sent: u64,
    /// Connections that a RST (or a timeout) ended.
    pub resets: u64,
}

impl TcpCounts {
    /// Those of a host up to now.
    ///
    /// # Errors
    ///
    /// When the host is gone.
    pub fn of(host: &Host) -> io::Result<Self> {
        let read = |name: &str| fs::read_to_string(format!("/proc/{}/net/{name}", host.init_pid()));
        let (plain, extended) = (read("snmp")?, read("netstat")?);
        let count = |text: &str, group: &str, name: &str| {
            snmp(text, group, name)
                .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("no {name}")))
        };
        Ok(Self {
            retransmitted: count(&plain, "Tcp:", "RetransSegs")?,
            probes: count(&extended, "TcpExt:", "TCPLossProbes")?,
            timeouts: count(&extended, "TcpExt:", "TCPTimeouts")?,
            resets_sent: count(&plain, "Tcp:", "OutRsts")?,
            resets: count(&plain, "Tcp:", "EstabResets")?,
        })
    }

    /// What has been added since an earlier look.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            retransmitted: self.retransmitted - earlier.retransmitted,
            probes: self.probes - earlier.probes,
            timeouts: self.timeouts - earlier.timeouts,
            resets_sent: self.resets_sent - earlier.resets_sent,
            resets: self.resets - earlier.resets,
        }
    }
}

/// A capture of every RST that passes a host's interface, either way.
#[derive(Debug)]
pub struct ResetCapture {
    tcpdump: std::process::Child,
}

impl ResetCapture {
    /// Begins, and waits until it has begun.
    ///
    /// # Errors
    ///
    /// When tcpdump does not start.
    pub fn start(host: &Host) -> io::Result<Self> {
        /// RST in the TCP flags of IPv4 and, without extension headers, IPv6.
        const FILTER: &str = "tcp[13] & 4 != 0 or (ip6[6] == 6 and ip6[53] & 4 != 0)";
        let mut tcpdump = host
            .command("tcpdump")
            .args([
                "-i",
                INTERFACE,
                "-n",
                "-l",
                "-tt",
                "--immediate-mode",
                FILTER,
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let stderr = tcpdump.stderr.take();
        let mut said = String::new();
        for line in stderr
            .into_iter()
            .flat_map(|stderr| BufReader::new(stderr).lines())
        {
            said += &line?;
            if said.contains("listening on") {
                return Ok(Self { tcpdump });
            }
        }
        let _ = tcpdump.wait();
        Err(io::Error::other(said))
    }

    /// The packets, one a line that begins with the seconds since 1970.
    ///
    /// # Errors
    ///
    /// When tcpdump does not end.
    pub fn stop(mut self) -> io::Result<Vec<String>> {
        let pid = nix::unistd::Pid::from_raw(self.tcpdump.id().cast_signed());
        nix::sys::signal::kill(pid, Signal::SIGTERM)?;
        let mut said = String::new();
        if let Some(stdout) = &mut self.tcpdump.stdout {
            stdout.read_to_string(&mut said)?;
        }
        self.tcpdump.wait()?;
        Ok(said
            .lines()
            .filter(|line| !line.is_empty())
            .map(ToOwned::to_owned)
            .collect())
    }
}

/// One counter of `/proc/net/snmp`: names in one line, values in the next.
fn snmp(text: &str, group: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter(|line| line.starts_with(group));
    let (names, values) = (lines.next()?, lines.next()?);
    let at = names.split_whitespace().position(|column| column == name)?;
    values.split_whitespace().nth(at)?.parse().ok()
}

/// Why a test cannot run here, for [`require!`](crate::require).
///
/// `need` is `root`, `tcx` (kernel 6.6), `migrate` and `xtask` (built), `vm` (QEMU),
/// `kernel_6_1` and the like (fetched), or the name of a program.
#[must_use]
pub fn lacking(need: &str) -> Option<String> {
    /// The private place of a CRIU that `scripts/setup` fetched.
    const OWN_CRIU: &str = "/opt/migrate/criu/bin/criu";
    match need {
        "root" => (!nix::unistd::geteuid().is_root()).then(|| "needs root".to_owned()),
        "tcx" => {
            let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
            let mut numbers = release.split(|c: char| !c.is_ascii_digit());
            let mut number = || {
                numbers
                    .next()
                    .and_then(|n| n.parse::<u32>().ok())
                    .unwrap_or(0)
            };
            let version = (number(), number());
            (version < (6, 6)).then(|| format!("needs Linux 6.6, this is {}", release.trim()))
        }
        "vm" => migrate_test_vms::lacking(),
        "unit_tests" => ["migrate-gate", "migrate-criu"]
            .into_iter()
            .find(|package| unit_tests(package).is_none())
            .map(|package| format!("needs `cargo test -p {package} --lib --no-run`")),
        "kernel_6_1" => lacking_kernel(Kernel::V6_1),
        "kernel_6_12" => lacking_kernel(Kernel::V6_12),
        "kernel_newest" => lacking_kernel(Kernel::Newest),
        "migrate" => {
            let path = std::env::var_os("MIGRATE_BIN")
                .map_or_else(|| crate::client::program("migrate"), Into::into);
            (!path.is_file()).then(|| format!("{} is not built", path.display()))
        }
        "xtask" => {
            let path = crate::client::program("xtask");
            (!path.is_file()).then(|| format!("{} is not built", path.display()))
        }
        "criu" => {
            let there = std::env::var_os("MIGRATE_CRIU").is_some()
                || Path::new(OWN_CRIU).is_file()
                || on_path("criu");
            (!there).then(|| "needs CRIU: run scripts/setup".to_owned())
        }
        "redis" => (!on_path("redis-server")).then(|| "needs redis-server".to_owned()),
        "chromium" => (!on_path("chromium-headless-shell"))
            .then(|| "needs chromium-headless-shell: run scripts/setup".to_owned()),
        "tcpdump" => (!on_path("tcpdump")).then(|| "needs tcpdump: run scripts/setup".to_owned()),
        "python" => (!Path::new("/usr/bin/python3").exists()).then(|| "needs python3".to_owned()),
        program => (!on_path(program)).then(|| format!("needs {program}")),
    }
}

/// The newest build of a package's own tests, beside the running one.
#[must_use]
pub fn unit_tests(package: &str) -> Option<PathBuf> {
    let this = std::env::current_exe().ok()?;
    let prefix = format!("{}-", package.replace('-', "_"));
    let built = |path: &PathBuf| fs::metadata(path).and_then(|file| file.modified()).ok();
    fs::read_dir(this.parent()?)
        .ok()?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            path.extension().is_none() && name.is_some_and(|name| name.starts_with(&prefix))
        })
        .max_by_key(built)
}

fn lacking_kernel(kernel: Kernel) -> Option<String> {
    let error = kernel.find().err()?;
    Some(format!("{error}: {}", error.help().unwrap_or_default()))
}

fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|directory| directory.join(program).is_file())
}

/// Ends the calling test unless this machine has all that it needs, and says
/// so: `require!("moves_redis": root, tcx, criu, migrate, redis)`.
#[macro_export]
macro_rules! require {
    ($test:literal: $($need:ident),+ $(,)?) => {
        $(
            if let Some(reason) = $crate::hosts::lacking(stringify!($need)) {
                println!(concat!("SKIP ", $test, ": {}"), reason);
                return;
            }
        )+
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_found_by_its_name() {
        let text = "Ip: A B\nIp: 1 2\nTcp: X EstabResets Y\nTcp: 7 8 9\n";
        assert_eq!(snmp(text, "Tcp:", "EstabResets"), Some(8));
        assert_eq!(snmp(text, "Tcp:", "Z"), None);
    }

    #[test]
    fn what_is_lacking_is_named() {
        assert_eq!(
            lacking("no-such-program").as_deref(),
            Some("needs no-such-program")
        );
        assert_eq!(lacking("sh"), None);
    }
}
