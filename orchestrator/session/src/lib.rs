//! The driver of a migration: phases in order, every effect beside its undo.
//!
//! ```text
//!            source/                          destination/
//!  preflight   examine the tree      ------->   compare with this host
//!  track       attach the gate, open
//!  prepare     fence, CRIU warm      ------->   gate closed, address staged, CRIU warm
//!  freeze      close the gate, CRIU seizes
//!  dump        pages and images      ------->   receive
//!  restore                                      restore, hold before the first instruction
//!  handover    record, fence, Go     ------->   record Owned            == the commit ==
//!  takeover                                     announce, open the gate, run
//!  finish      remove the frozen tree
//! ```
//!
//! The source's side is [`source::migrate`], the destination's
//! [`destination::serve`]. Only this crate knows all adapters.

pub mod cancel;
pub mod destination;
pub mod error;
pub mod figures;
pub mod guard;
mod held;
mod images;
mod inbox;
pub mod journal;
pub mod park;
mod pause;
pub mod policy;
pub mod progress;
pub mod recover;
pub mod reports;
pub mod secrets;
pub mod seen;
pub mod source;
mod state;
pub mod sweep;

pub use cancel::Cancel;
pub use error::Error;
pub use progress::{Progress, Reporter};
pub use state::State;

/// Who this process is, for the hello of a connection.
#[must_use]
pub fn hello(migration_id: &str) -> migrate_core::wire::Hello {
    migrate_core::wire::Hello {
        protocol: migrate_core::wire::PROTOCOL_VERSION,
        release: env!("CARGO_PKG_VERSION").to_owned(),
        hostname: hostname(),
        migration_id: migration_id.to_owned(),
    }
}

/// What the process of a unit does that takes a moved tree in: the tree whose root
/// has this PID and began at this moment, in clock ticks since the boot, comes into
/// the cgroup of this process.
///
/// # Errors
///
/// It has gone, or cannot be moved whole; then it is where it was.
pub fn adopt(pid: i32, ticks: u64, home: &str) -> Result<(), Error> {
    Ok(migrate_proc::bring_in(pid, ticks, home)?)
}

/// `uname -n`.
#[must_use]
pub fn hostname() -> String {
    nix::unistd::gethostname().map_or_else(
        |_| "this host".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// Packets of the tree that a gate has dropped, in both directions.
fn dropped_packets(counted: &migrate_gate::Counters) -> u64 {
    counted.ingress_dropped_packets + counted.egress_dropped_packets + counted.hold_dropped
}

/// CRIU's part in keeping packets from a tree.
fn criu_lock(lock: migrate_core::wire::NetworkLock) -> migrate_criu::NetworkLock {
    use migrate_core::wire::NetworkLock;
    match lock {
        NetworkLock::Gate | NetworkLock::Drop | NetworkLock::Skip => {
            migrate_criu::NetworkLock::Caller
        }
        NetworkLock::Nftables => migrate_criu::NetworkLock::Nftables,
        NetworkLock::Iptables => migrate_criu::NetworkLock::Iptables,
    }
}

/// Finds CRIU and lets it probe the kernel, which it caches: the finding for
/// the table, and CRIU when there is one to work with.
async fn examine_criu(
    host: &str,
) -> (
    Vec<migrate_core::preflight::Finding>,
    Option<migrate_criu::Criu>,
) {
    use migrate_core::preflight::Finding;
    let subject = format!("criu on the {host}");
    match migrate_criu::locate().await {
        Ok(criu) => {
            let mut findings = vec![Finding::ok(
                &subject,
                format!("{} at {}", criu.version, criu.path.display()),
            )];
            findings.extend(untested(&subject, criu.version));
            // Its check asks for more than every tree needs.
            if let Err(error) = criu.warm().await {
                findings.push(Finding::note(
                    &subject,
                    error::chain(&error),
                    error.help().unwrap_or_default(),
                ));
            }
            (findings, Some(criu))
        }
        Err(error) => {
            let refused = Finding::refused(
                &subject,
                error::chain(&error),
                error.help().unwrap_or_default(),
            );
            (vec![refused], None)
        }
    }
}

/// Of a CRIU that may do otherwise than those that are known.
fn untested(
    subject: &str,
    version: migrate_core::facts::CriuVersion,
) -> Option<migrate_core::preflight::Finding> {
    use migrate_core::facts::CriuVersion;
    version.is_untested().then(|| {
        migrate_core::preflight::Finding::note(
            subject,
            format!(
                "CRIU {version} is newer than what this was tested with ({})",
                CriuVersion::NEWEST_TESTED
            ),
            "a page stream that is not as it was ends the dump, and the tree runs on; --verify \
             compares the copy's memory",
        )
    })
}

#[cfg(test)]
mod tests {
    use migrate_core::facts::CriuVersion;

    #[test]
    fn a_criu_that_nobody_has_tried_is_told() {
        let told = |minor| {
            let version = CriuVersion {
                major: 4,
                minor,
                sublevel: 1,
            };
            super::untested("criu on the source", version).map(|finding| finding.finding)
        };
        assert_eq!(told(2), None);
        assert_eq!(
            told(3).unwrap(),
            "CRIU 4.3.1 is newer than what this was tested with (4.2)"
        );
    }
}
