//! A parked tree: what its directory says about itself.
//!
//! ```text
//! DIR/NAME/images/        what CRIU and the page stream have written
//! DIR/NAME/manifest.json  [`Manifest`], written last: with it the tree is parked
//! DIR/NAME/mark.json      [`Mark`], from the moment on in which it may run again
//! ```
//!
//! A tree whose images another host keeps leaves a *stub* here, which the boot and
//! the resume go by; what is left out of it is over there:
//!
//! ```text
//! DIR/NAME/away.json      [`Away`], before the manifest: the images are elsewhere
//! DIR/NAME/manifest.json  the same as over there, with every image's digest
//! ```

use serde::{Deserialize, Serialize};

use crate::Flow;
use crate::facts::{HostFacts, TreeFacts};
use crate::journal::Route;
use crate::tracked::Tracked;
use crate::wire::StdioChoice;

/// Version of the manifest and of what it describes; another one is refused.
pub const MANIFEST_VERSION: u32 = 1;

/// Bytes of a manifest that are read: a tree with a hundred thousand
/// connections needs some thirty millions.
pub const MANIFEST_BYTES_MAX: u64 = 256 << 20;

/// Everything `resume` has to know about a parked tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`MANIFEST_VERSION`].
    pub version: u32,
    /// Release of `migrate` that has written it, for messages.
    pub release: String,
    /// Name of the parking, and of the gate that guards its connections.
    pub id: String,
    /// Seconds since 1970 when the tree was parked.
    pub parked_unix_s: u64,
    /// `/etc/machine-id`; none where the machine has none.
    pub machine_id: Option<String>,
    /// `/proc/sys/kernel/random/boot_id` of the kernel that ran the tree.
    pub boot_id: String,
    /// The machine as it was: kernel, CRIU, processor.
    pub host: HostFacts,
    /// The tree, with the files that have to be there alike, its connections
    /// and its addresses.
    pub tree: TreeFacts,
    /// What becomes of standard streams that led out of the tree.
    pub stdio: StdioChoice,
    /// What connection tracking knew of its connections.
    pub tracked: Vec<Tracked>,
    /// Connections that it has closed and whose peers may still speak.
    pub ended: Vec<Flow>,
    /// What is known of the patience of each connection.
    pub patience: Vec<Patience>,
    /// Every file of the images.
    pub images: Vec<ImageFile>,
}

/// How long a connection bears silence, as far as one end shows it.
///
/// These are the timers of the tree's own end. The peer's are not visible from
/// here; programs that set a timer as a rule do so on both ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Patience {
    /// The connection.
    pub flow: Flow,
    /// `SO_KEEPALIVE` with its times; none when it is off.
    pub keepalive: Option<Keepalive>,
    /// `TCP_USER_TIMEOUT` in milliseconds, 0 for the system's.
    pub user_timeout_ms: u32,
}

/// The times of `SO_KEEPALIVE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Keepalive {
    /// `TCP_KEEPIDLE`: silence before the first probe, in seconds.
    pub idle_s: u32,
    /// `TCP_KEEPINTVL`: from one probe to the next, in seconds.
    pub interval_s: u32,
    /// `TCP_KEEPCNT`: probes without an answer that end the connection.
    pub probes: u32,
}

impl Patience {
    /// What an end with these timers bears, in seconds; none when it bears any
    /// silence.
    #[must_use]
    pub fn silence_s(&self) -> Option<u64> {
        let keepalive = self.keepalive?;
        // Linux net/ipv4/tcp_timer.c, tcp_keepalive_timer(): with a user timeout
        // set, that is what ends it once a probe has gone unanswered.
        let unanswered = match self.user_timeout_ms {
            0 => u64::from(keepalive.interval_s) * u64::from(keepalive.probes),
            ms => u64::from(ms)
                .div_ceil(1000)
                .saturating_sub(u64::from(keepalive.idle_s))
                .max(u64::from(keepalive.interval_s)),
        };
        Some(u64::from(keepalive.idle_s) + unanswered)
    }
}

/// Seconds after which Linux gives up data that nobody acknowledges, unless
/// told otherwise: 15 retransmissions (`net.ipv4.tcp_retries2`), from the
/// kernel's documentation, `networking/ip-sysctl.rst`.
pub const RETRANSMISSION_DEFAULT_S: u64 = 924;

/// One file of the images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// Its name, without a directory.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// BLAKE3 of its content, in hexadecimal digits.
    pub blake3: String,
}

/// How far a parked tree has come back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "stage", rename_all = "snake_case")]
pub enum Mark {
    /// `resume` was about to let it run: it may have run since.
    Resuming {
        /// Name of the attempt, which this host's journal knows.
        id: String,
        /// The kernel on which it was made.
        boot_id: String,
    },
    /// It has run since.
    Resumed {
        /// Seconds since 1970.
        unix_s: u64,
        /// The images are still there.
        images_kept: bool,
    },
    /// On the host that keeps it for another: that one has fetched it, and may
    /// run it or have run it since.
    Taken {
        /// Who, by name.
        by: String,
        /// `/etc/machine-id` there.
        machine_id: Option<String>,
        /// Seconds since 1970.
        unix_s: u64,
    },
}

/// Where the images of a stub are. It holds no secret: who asks for them proves
/// itself as for any migration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Away {
    /// Name of the parking, as in the manifest.
    pub id: String,
    /// `uname -n` of the host that keeps them.
    pub keeper: String,
    /// How it is reached.
    pub route: Route,
    /// The store they are in there ([`StoreId`]).
    pub store: StoreId,
    /// How much this host knows.
    pub state: AwayState,
}

/// What a host knows of a tree that another one keeps for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AwayState {
    /// The word that it is parked may have come or not: the keeper decides.
    Pending,
    /// It is parked there.
    Kept,
}

/// Name of a directory in which sets are kept for others, made at random when
/// it is first used and written into it. A set that is not there proves that it
/// never was complete only where this is: a disk that is not mounted has none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreId(pub String);

/// The tree that a source wants to have kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// Name of the set.
    pub name: String,
    /// `/etc/machine-id` of the source: it comes back there.
    pub machine_id: Option<String>,
    /// The source's `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// A question about a set that is kept, from the host that it is kept for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptQuestion {
    /// Name of the set.
    pub name: String,
    /// Name of the parking. Nobody but the two hosts knows it.
    pub id: String,
    /// Where it was put.
    pub store: StoreId,
    /// What is wanted.
    pub wanted: KeptWanted,
}

/// What is wanted of a set that is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum KeptWanted {
    /// Is it complete? One that is not is removed before the answer, which so
    /// stays true.
    Verdict,
    /// Its images, to run it.
    Images {
        /// `/etc/machine-id` of who asks.
        machine_id: Option<String>,
        /// Also where somebody else may have run it.
        force: bool,
    },
    /// It runs where it belongs: remove it.
    Done {
        /// Keep the images all the same.
        keep: bool,
    },
}

/// Whether a name, of an image or of a set, is one file's and no path.
#[must_use]
pub fn is_plain(name: &str) -> bool {
    (1..=128).contains(&name.len())
        && !name.starts_with(['.', '-'])
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.@+".contains(&byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_in_their_directory() {
        for name in ["redis", "redis-server-12", "pages-1.img", "a_b@c.d"] {
            assert!(is_plain(name), "{name}");
        }
        let long = "x".repeat(129);
        for name in ["", ".", "..", "a/b", "/etc", "-rf", "a b", "a\0", &long] {
            assert!(!is_plain(name), "{name}");
        }
    }

    #[test]
    fn the_silence_that_an_end_bears() {
        let of = |keepalive, user_timeout_ms| {
            Patience {
                flow: Flow::new(([10, 0, 0, 1], 1).into(), ([10, 0, 0, 2], 2).into()),
                keepalive,
                user_timeout_ms,
            }
            .silence_s()
        };
        let redis = Keepalive {
            idle_s: 300,
            interval_s: 100,
            probes: 3,
        };
        assert_eq!(of(None, 0), None);
        assert_eq!(of(None, 5000), None);
        assert_eq!(of(Some(redis), 0), Some(600));
        assert_eq!(of(Some(redis), 350_000), Some(400));
        assert_eq!(of(Some(redis), 450_000), Some(450));
    }
}
