//! What an agent may restore: a restore is code execution as root.
//!
//! A rule that is not there allows everything, but for tunnel devices and units: a
//! file that does not name them allows none. What the source says about its
//! tree is judged before anything is changed; whom the copy would run as is
//! judged once more by the images, which is what counts.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::facts::{FileRole, TreeFacts};
use crate::preflight::Finding;

/// An agent's rules.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Names in the certificates of sources; for a standing agent only.
    pub peers: Option<Vec<String>>,
    /// Users, by number, that a tree may run as.
    pub users: Option<BTreeSet<u32>>,
    /// Where addresses that move may lie.
    pub addresses: Option<Vec<Network>>,
    /// Build-ids of programs that may run, in hexadecimal digits.
    pub build_ids: Option<BTreeSet<String>>,
    /// The most memory that a tree may have, in MiB.
    pub memory_mib_max: Option<u64>,
    /// Tunnel devices of this host that a tree may serve. A device is the host's,
    /// with addresses and routes, and whose program serves it is not to be seen
    /// from the tree's user; so what says nothing of them allows none.
    #[serde(default = "none_of_them")]
    pub tunnels: Option<BTreeSet<String>>,
    /// Where trees are kept for other hosts (`migrate park --to`), a directory of
    /// root's alone. They do not run here, but their memory lies on the disk; so a
    /// file that does not name a directory allows none. Without a file it is
    /// [`KEPT_DIRECTORY`].
    #[serde(default = "kept_nowhere")]
    pub keep: Keeping,
    /// Services of this host that may take a tree which was their namesake's main
    /// process. A unit that has a tree counts as started, and is started anew when
    /// the tree ends; so what says nothing of them allows none, and trees get scopes.
    #[serde(default = "none_of_them")]
    pub units: Option<BTreeSet<String>>,
}

/// Where trees are kept for other hosts unless a policy says otherwise. Not where
/// this host parks its own: what it does at boot with those is not for others'.
pub const KEPT_DIRECTORY: &str = "/var/lib/migrate/kept";

/// Where trees are kept for other hosts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(from = "PathBuf")]
pub enum Keeping {
    /// Nothing is said: in [`KEPT_DIRECTORY`], which is made when it is needed.
    #[default]
    Default,
    /// Here.
    In(PathBuf),
    /// Nowhere.
    Nowhere,
}

impl From<PathBuf> for Keeping {
    fn from(path: PathBuf) -> Self {
        Self::In(path)
    }
}

const fn kept_nowhere() -> Keeping {
    Keeping::Nowhere
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "the type of the field, whose `None` is for hosts without a policy"
)]
fn none_of_them() -> Option<BTreeSet<String>> {
    Some(BTreeSet::new())
}

/// A range of addresses: `10.77.0.0/16`, `fd00::/8`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

/// A text that is no range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is no address and no range of addresses such as 10.77.0.0/16")]
pub struct NotANetwork(String);

impl FromStr for Network {
    type Err = NotANetwork;

    fn from_str(text: &str) -> Result<Self, NotANetwork> {
        let wrong = || NotANetwork(text.to_owned());
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = bits(address).1;
        let prefix = match prefix {
            Some(prefix) => prefix.parse().map_err(|_| wrong())?,
            None => most,
        };
        if prefix > most {
            return Err(wrong());
        }
        Ok(Self { address, prefix })
    }
}

impl TryFrom<String> for Network {
    type Error = NotANetwork;

    fn try_from(text: String) -> Result<Self, NotANetwork> {
        text.parse()
    }
}

/// An address as a number, and how many bits it has.
fn bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(v4) => (u32::from(v4).into(), 32),
        IpAddr::V6(v6) => (v6.into(), 128),
    }
}

impl Network {
    /// Whether an address lies in it.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        let (own, most) = bits(self.address);
        let (other, bits) = bits(address);
        // A prefix of 0 would shift by as many bits as there are.
        let differ = (own ^ other).checked_shr(u32::from(most - self.prefix));
        bits == most && (self.prefix == 0 || differ == Some(0))
    }
}

/// Whom a process or thread runs as.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved and file system user.
    pub users: BTreeSet<u32>,
    /// Some capability is permitted, effective or inheritable.
    pub privileged: bool,
}

/// What a policy does not allow.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("this agent's policy does not allow {0}")]
pub struct NotAllowed(String);

/// What the user can do about it.
pub const WAY_OUT: &str =
    "ask whoever answers for the destination to allow it in the agent's policy";

impl Policy {
    /// Judges what the source says about its tree.
    #[must_use]
    pub fn judge(&self, tree: &TreeFacts) -> Vec<Finding> {
        let refused = |subject: String, what: String| {
            Finding::refused(subject, NotAllowed(what).to_string(), WAY_OUT)
        };
        let mut findings = Vec::new();
        if let Some(allowed) = &self.addresses {
            for address in &tree.addresses {
                if !allowed.iter().any(|range| range.contains(address.ip)) {
                    findings.push(refused(
                        format!("address {}", address.ip),
                        "this address".to_owned(),
                    ));
                }
            }
        }
        if let Some(allowed) = &self.build_ids {
            for file in tree.files.iter().filter(|f| f.role == FileRole::Executable) {
                let id = file.build_id.as_deref().map(hexadecimal);
                let what = match id {
                    Some(id) if allowed.contains(&id) => continue,
                    Some(id) => format!("a program with the build-id {id}"),
                    None => "a program without a build-id".to_owned(),
                };
                findings.push(refused(format!("file {}", file.path), what));
            }
        }
        if let (Some(allowed), Some(tunnel)) = (&self.tunnels, &tree.tunnel)
            && !allowed.contains(&tunnel.name)
        {
            findings.push(refused(
                format!("tunnel device {}", tunnel.name),
                "a tree to serve this tunnel device".to_owned(),
            ));
        }
        for process in &tree.processes {
            if let Err(NotAllowed(what)) = self.admits(&process.name, &process.credentials) {
                findings.push(refused(format!("process {}", process.pid), what));
            }
        }
        findings.extend(self.judge_size(tree));
        findings
    }

    /// Whether a tree may be kept here: it does not run, so all that counts is
    /// whether any is kept, and its size.
    ///
    /// # Errors
    ///
    /// None is kept here.
    pub fn keeps(&self) -> Result<&Path, NotAllowed> {
        match &self.keep {
            Keeping::Default => Ok(Path::new(KEPT_DIRECTORY)),
            Keeping::In(directory) => Ok(directory),
            Keeping::Nowhere => Err(NotAllowed("trees to be kept here".to_owned())),
        }
    }

    /// Judges the size of a tree.
    #[must_use]
    pub fn judge_size(&self, tree: &TreeFacts) -> Option<Finding> {
        let most = self.memory_bytes_max()?;
        (tree.resident_bytes > most).then(|| {
            let what = format!(
                "{} MiB of memory, only {} MiB",
                tree.resident_bytes >> 20,
                most >> 20
            );
            Finding::refused("memory", NotAllowed(what).to_string(), WAY_OUT)
        })
    }

    /// Whether a service of this host may take a tree.
    #[must_use]
    pub fn admits_unit(&self, unit: &str) -> bool {
        self.units
            .as_ref()
            .is_none_or(|allowed| allowed.contains(unit))
    }

    /// The most memory that a tree may have, in bytes.
    #[must_use]
    pub fn memory_bytes_max(&self) -> Option<u64> {
        self.memory_mib_max.map(|mib| mib.saturating_mul(1 << 20))
    }

    /// Judges whom a process would run as.
    ///
    /// # Errors
    ///
    /// A user is not on the list, or has capabilities and root is not.
    pub fn admits(&self, name: &str, credentials: &Credentials) -> Result<(), NotAllowed> {
        let Some(allowed) = &self.users else {
            return Ok(());
        };
        if let Some(user) = credentials.users.difference(allowed).next() {
            return Err(NotAllowed(format!(
                "user {user}, as which {name} would run"
            )));
        }
        if credentials.privileged && !allowed.contains(&0) {
            return Err(NotAllowed(format!(
                "root, whose capabilities {name} would have"
            )));
        }
        Ok(())
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::TunnelFacts;

    fn network(text: &str) -> Network {
        text.parse().unwrap()
    }

    #[test]
    fn ranges_of_addresses() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        for (range, inside, outside) in [
            ("10.77.0.0/16", "10.77.255.1", "10.78.0.1"),
            ("10.77.0.100", "10.77.0.100", "10.77.0.101"),
            ("0.0.0.0/0", "255.1.2.3", "::1"),
            ("fd00::/8", "fdff::1", "fe80::1"),
            ("::/0", "fe80::1", "10.0.0.1"),
            ("::1", "::1", "::2"),
        ] {
            let range = network(range);
            assert!(range.contains(address(inside)), "{range:?} {inside}");
            assert!(!range.contains(address(outside)), "{range:?} {outside}");
        }
        for wrong in [
            "",
            "10.0.0.0/33",
            "::/129",
            "10.0.0/8",
            "10.0.0.0/-1",
            "host",
        ] {
            assert!(wrong.parse::<Network>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn tunnel_devices_are_judged_by_name() {
        let tree = |tunnel: Option<&str>| TreeFacts {
            tunnel: tunnel.map(|name| TunnelFacts {
                name: name.to_owned(),
                flags: 0x1801,
                open_flags: 2,
            }),
            root_pid: 1,
            ..TreeFacts::default()
        };
        let policy = Policy {
            tunnels: Some(["tun0".to_owned()].into()),
            ..Policy::default()
        };
        assert_eq!(policy.judge(&tree(None)), []);
        assert_eq!(policy.judge(&tree(Some("tun0"))), []);
        assert_eq!(Policy::default().judge(&tree(Some("tun1"))), []);
        let findings = policy.judge(&tree(Some("tun1")));
        assert!(
            matches!(&findings[..], [only] if only.subject.contains("tun1")),
            "{findings:?}"
        );
    }

    #[test]
    fn trees_are_kept_where_a_file_says_so() {
        let of = |keep| Policy {
            keep,
            ..Policy::default()
        };
        assert_eq!(Policy::default().keeps(), Ok(Path::new(KEPT_DIRECTORY)));
        let named = Keeping::In("/srv/kept".into());
        assert_eq!(of(named).keeps(), Ok(Path::new("/srv/kept")));
        assert!(of(Keeping::Nowhere).keeps().is_err());
    }

    #[test]
    fn users_are_judged_by_all_their_numbers_and_capabilities() {
        let policy = Policy {
            users: Some([999].into()),
            ..Policy::default()
        };
        let of = |users: &[u32], privileged| Credentials {
            users: users.iter().copied().collect(),
            privileged,
        };
        assert!(policy.admits("redis", &of(&[999], false)).is_ok());
        for refused in [of(&[0], true), of(&[999, 0], false), of(&[999], true)] {
            assert!(policy.admits("redis", &refused).is_err(), "{refused:?}");
        }
        assert!(Policy::default().admits("redis", &of(&[0], true)).is_ok());
    }
}
