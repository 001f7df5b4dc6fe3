//! How it is moved: by this product in its variants, or by stock CRIU in the
//! hands of an expert.

use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context as _, bail, ensure};
use migrate_core::Phase;
use migrate_core::report::Report;
use migrate_test_hosts::{Host, HostName, INTERFACE, Lab, PREFIX_BITS_V4, PREFIX_BITS_V6};
use migrate_tests::migration;

/// Where CRIU is when `scripts/setup` fetched it.
const PRIVATE_CRIU: &str = "/opt/migrate/criu/bin/criu";

/// Image directory of the stock way, on tmpfs of either host.
const IMAGES: &str = "/run/stock";

/// For a reply, as a rule.
const REPLY_LIMIT: Duration = Duration::from_secs(120);

/// For a reply that may never come.
const LOST_LIMIT: Duration = Duration::from_secs(10);

/// A way to move a tree from `host1` to `host2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Method {
    /// This product with these options.
    Ours {
        name: &'static str,
        options: &'static [&'static str],
        /// Whether requests are lost with them.
        lossy: bool,
    },
    /// `criu dump`, a copy from tmpfs to tmpfs, `criu restore`, gratuitous ARP.
    Stock {
        lock: &'static str,
        /// Whether requests are lost with it.
        lossy: bool,
    },
}

impl Method {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Ours { name, .. } => name.to_owned(),
            Self::Stock { lock, .. } => format!("stock, {lock}"),
        }
    }

    /// How long a client waits for a reply: iptables with many connections stand
    /// still for a minute, and where nothing keeps packets from the frozen tree
    /// some replies never come.
    pub(crate) const fn reply_limit(self) -> Duration {
        match self {
            Self::Ours { lossy: true, .. } | Self::Stock { lossy: true, .. } => LOST_LIMIT,
            _ => REPLY_LIMIT,
        }
    }

    /// What has to be done before, off the clock.
    pub(crate) fn prepare(self, lab: &Lab, address: IpAddr) -> anyhow::Result<Prepared> {
        match self {
            Self::Ours { .. } => Ok(Prepared { announcer: None }),
            Self::Stock { .. } => {
                let (source, destination) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
                for host in [&source, &destination] {
                    fs::create_dir_all(host.path(IMAGES))?;
                    // Leaves its findings about the kernel in /run, which the
                    // runs that count then need not make again.
                    run(host, &format!("{} check >/dev/null 2>&1", criu()))?;
                }
                Ok(Prepared {
                    announcer: Some(Announcer::start(&destination, address)?),
                })
            }
        }
    }

    /// Moves the tree; the report is this product's own.
    pub(crate) fn perform(
        self,
        lab: &Lab,
        pid: i32,
        prepared: Prepared,
    ) -> anyhow::Result<(Duration, Option<Report>)> {
        let begun = Instant::now();
        match self {
            Self::Ours { options, .. } => {
                let pid = pid.to_string();
                // A comparison must not end at a bound made for production.
                let arguments =
                    [options, &["--max-blackout", "100", "--to", "host2", &pid]].concat();
                let moved = migration::migrate(&lab.host(HostName::Host1), arguments)?;
                let took = begun.elapsed();
                match moved.report {
                    Some(report) if report.outcome == Phase::Committed => Ok((took, Some(report))),
                    _ => bail!(
                        "migrate ended with {:?}: {}",
                        moved.code,
                        moved.stderr.trim()
                    ),
                }
            }
            Self::Stock { lock, .. } => {
                stock(lab, pid, lock, prepared)?;
                Ok((begun.elapsed(), None))
            }
        }
    }
}

/// What stands ready when the clock starts.
pub(crate) struct Prepared {
    announcer: Option<Announcer>,
}

/// As `ip addr` takes it, on the hosts' interface.
fn placed(address: IpAddr) -> String {
    match address {
        IpAddr::V4(_) => format!("{address}/{PREFIX_BITS_V4} dev {INTERFACE}"),
        // Nobody asks for a second first whether somebody has it.
        IpAddr::V6(_) => format!("{address}/{PREFIX_BITS_V6} dev {INTERFACE} nodad"),
    }
}

pub(crate) fn criu() -> String {
    std::env::var("MIGRATE_CRIU").unwrap_or_else(|_| {
        if std::path::Path::new(PRIVATE_CRIU).exists() {
            PRIVATE_CRIU.to_owned()
        } else {
            "criu".to_owned()
        }
    })
}

/// Whether the kernel marks the pages that are written, as CRIU's own rounds
/// need it (`CONFIG_MEM_SOFT_DIRTY`).
pub(crate) fn marks_soft_dirty() -> bool {
    Command::new(criu())
        .args(["check", "--feature", "mem_dirty_track"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn run(host: &Host, script: &str) -> anyhow::Result<()> {
    let output = host.exec(["sh", "-c", script])?;
    ensure!(
        output.status.success(),
        "`{script}` on {} ended with {}: {}{}",
        host.name(),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    Ok(())
}

fn stock(lab: &Lab, pid: i32, lock: &str, prepared: Prepared) -> anyhow::Result<()> {
    let (source, destination) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    let announcer = prepared.announcer.context("nobody announces")?;
    let (criu, address) = (criu(), placed(announcer.address));
    let common =
        format!("-D {IMAGES} --tcp-established --network-lock {lock} --manage-cgroups=ignore -v0");
    run(
        &source,
        &format!("{criu} dump -t {pid} {common} -o dump.log && ip addr del {address}"),
    )
    .context("the stock dump")?;
    copy(&source, &destination).context("the copy of the images")?;
    run(
        &destination,
        &format!("ip addr add {address} && {criu} restore {common} -o restore.log -d"),
    )
    .context("the stock restore")?;
    announcer.announce()
}

/// From tmpfs to tmpfs of one machine: the network costs the stock way nothing.
fn copy(source: &Host, destination: &Host) -> anyhow::Result<()> {
    for entry in fs::read_dir(source.path(IMAGES))? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            fs::copy(
                entry.path(),
                destination.path(IMAGES).join(entry.file_name()),
            )?;
        }
    }
    Ok(())
}

/// A started interpreter that says once where the address is now.
struct Announcer {
    child: Child,
    address: IpAddr,
}

impl Announcer {
    fn start(host: &Host, address: IpAddr) -> anyhow::Result<Self> {
        // An ARP request for one's own address, or an unsolicited neighbour
        // advertisement that overrides what is known.
        let (open, say) = match address {
            IpAddr::V4(_) => (
                format!(
                    "s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)\n\
                     s.bind(('{INTERFACE}', 0))\n\
                     ip = socket.inet_aton('{address}')\n"
                ),
                "arp = b'\\0\\1\\x08\\0\\6\\4\\0\\1' + mac + ip + b'\\0' * 6 + ip\n\
                 s.send(b'\\xff' * 6 + mac + b'\\x08\\x06' + arp)\n",
            ),
            IpAddr::V6(_) => (
                format!(
                    "s = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)\n\
                     s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)\n\
                     s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, \
                     socket.if_nametoindex('{INTERFACE}'))\n\
                     ip = socket.inet_pton(socket.AF_INET6, '{address}')\n"
                ),
                "s.sendto(b'\\x88\\0\\0\\0\\x20\\0\\0\\0' + ip + b'\\2\\1' + mac, ('ff02::1', 0))\n",
            ),
        };
        let script = format!(
            "import socket, sys\n\
             mac = bytes.fromhex(open('/sys/class/net/{INTERFACE}/address').read().strip().replace(':', ''))\n\
             {open}\
             print('ready', flush=True)\n\
             sys.stdin.readline()\n\
             {say}"
        );
        let mut command: Command = host.command("python3");
        command.args(["-c", &script]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut ready = [0; 6];
        let stdout = child.stdout.as_mut().context("the announcer's output")?;
        io::Read::read_exact(stdout, &mut ready).context("the announcer did not start")?;
        Ok(Self { child, address })
    }

    fn announce(mut self) -> anyhow::Result<()> {
        // The end of its input is the word.
        drop(self.child.stdin.take());
        ensure!(self.child.wait()?.success(), "the announcement failed");
        Ok(())
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
