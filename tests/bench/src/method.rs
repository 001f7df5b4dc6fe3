//! How it is moved: by this product in its variants, or by stock CRIU in the
//! hands of an expert.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use migrate_core::Phase;
use migrate_core::report::Report;
use migrate_test_hosts::{Host, HostName, INTERFACE, Lab, PREFIX_BITS_V4, PREFIX_BITS_V6};
use migrate_tests::migration;

use crate::announcer::Announcer;

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
        /// Times that `criu pre-dump` is called before, each followed by a copy of
        /// what it has written.
        pre_dumps: u8,
    },
}

impl Method {
    pub(crate) fn name(self) -> String {
        match self {
            Self::Ours { name, .. } => name.to_owned(),
            Self::Stock {
                lock, pre_dumps: 0, ..
            } => format!("stock, {lock}"),
            Self::Stock {
                lock, pre_dumps, ..
            } => format!("stock, {lock}, {pre_dumps} pre-dumps"),
        }
    }

    /// Whether a failure is a result, and not a fault of ours.
    pub(crate) const fn may_fail(self) -> bool {
        !matches!(self, Self::Ours { lossy: false, .. })
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
            Self::Stock {
                lock, pre_dumps, ..
            } => {
                stock(lab, pid, (lock, pre_dumps), prepared)?;
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
        if Path::new(PRIVATE_CRIU).exists() {
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

fn stock(
    lab: &Lab,
    pid: i32,
    (lock, pre_dumps): (&str, u8),
    prepared: Prepared,
) -> anyhow::Result<()> {
    let (source, destination) = (lab.host(HostName::Host1), lab.host(HostName::Host2));
    let announcer = prepared.announcer.context("nobody announces")?;
    let (criu, address) = (criu(), placed(announcer.address()));
    // One directory for each, which names the one before as its parent.
    let directory = |round: u8| format!("{IMAGES}/{round}");
    let tracking = |round: u8| match (round.checked_sub(1), pre_dumps) {
        (_, 0) => String::new(),
        (None, _) => "--track-mem".to_owned(),
        (Some(before), _) => format!("--track-mem --prev-images-dir ../{before}"),
    };
    for round in 0..pre_dumps {
        let (directory, tracking) = (directory(round), tracking(round));
        fs::create_dir(source.path(&directory))?;
        run(
            &source,
            &format!("{criu} pre-dump -t {pid} -D {directory} {tracking} -v0 -o dump.log"),
        )
        .context("a stock pre-dump")?;
        copy(&source, &destination, &directory).context("the copy of a pre-dump")?;
    }
    let (last, tracking) = (directory(pre_dumps), tracking(pre_dumps));
    fs::create_dir(source.path(&last))?;
    let common =
        format!("-D {last} --tcp-established --network-lock {lock} --manage-cgroups=ignore -v0");
    run(
        &source,
        &format!("{criu} dump -t {pid} {common} {tracking} -o dump.log && ip addr del {address}"),
    )
    .context("the stock dump")?;
    copy(&source, &destination, &last).context("the copy of the images")?;
    run(
        &destination,
        &format!("ip addr add {address} && {criu} restore {common} -o restore.log -d"),
    )
    .context("the stock restore")?;
    announcer.announce()
}

/// From tmpfs to tmpfs of one machine: the network costs the stock way nothing.
fn copy(source: &Host, destination: &Host, directory: &str) -> anyhow::Result<()> {
    let (from, to) = (source.path(directory), destination.path(directory));
    fs::create_dir(&to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let place = to.join(entry.file_name());
        if entry.file_type()?.is_symlink() {
            // The parent's directory, which lies beside this one there as well.
            let target = fs::read_link(entry.path())?;
            ensure!(target.is_relative(), "{} is not relative", target.display());
            std::os::unix::fs::symlink::<&Path, &Path>(&target, &place)?;
        } else if entry.file_type()?.is_file() {
            fs::copy(entry.path(), place)?;
        }
    }
    Ok(())
}
