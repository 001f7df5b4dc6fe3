//! The file in which an agent's host says what may be restored there.

use std::io::{self, ErrorKind, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use migrate_core::policy::Policy;

use crate::error::Error;

/// Where it is looked for when nothing else is said. Where there is none,
/// everything is allowed to whoever gets in.
pub const FILE: &str = "/etc/migrate/agent.toml";

/// The largest file that is read.
const BYTES_MAX: u64 = 1 << 20;

/// Reads a policy; `None` where there is no such file.
///
/// # Errors
///
/// Somebody other than root could have written it, or it is none: a rule that
/// is not understood must not count as no rule.
pub fn read(path: &Path) -> Result<Option<Policy>, Error> {
    let wrong = |source| Error::Policy {
        path: path.to_owned(),
        source,
    };
    let file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(wrong(error.into())),
    };
    let metadata = file.metadata().map_err(|error| wrong(error.into()))?;
    let owner = nix::unistd::geteuid().as_raw();
    if (metadata.uid() != 0 && metadata.uid() != owner) || metadata.mode() & 0o022 != 0 {
        let why = "others than root can write to it";
        return Err(wrong(
            io::Error::new(ErrorKind::PermissionDenied, why).into(),
        ));
    }
    let mut text = String::new();
    file.take(BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|error| wrong(error.into()))?;
    if text.len() as u64 > BYTES_MAX {
        let why = "it is larger than 1 MiB";
        return Err(wrong(io::Error::new(ErrorKind::FileTooLarge, why).into()));
    }
    toml::from_str(&text)
        .map(Some)
        .map_err(|error| wrong(error.into()))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt as _;

    use migrate_core::policy::Keeping;

    use super::*;

    fn of(text: &str) -> Result<Option<Policy>, Error> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        read(&path)
    }

    #[test]
    fn every_rule_is_read() {
        let policy = of(
            "peers = ['host1']\nusers = [0, 999]\naddresses = ['10.0.0.0/8', '::1']\n\
             build_ids = ['c0ffee']\nmemory_mib_max = 64\n\
             tunnels = ['tun0']\nkeep = '/srv/kept'\n\
              units = ['redis-server.service']\n",
        )
        .unwrap()
        .unwrap();
        assert_eq!(policy.peers, Some(vec!["host1".to_owned()]));
        assert_eq!(policy.users, Some([0, 999].into()));
        assert!(policy.admits_unit("redis-server.service"));
        assert!(!policy.admits_unit("sshd.service"));
        assert_eq!(policy.addresses.unwrap().len(), 2);
        assert_eq!(policy.build_ids, Some(["c0ffee".to_owned()].into()));
        assert_eq!(policy.memory_mib_max, Some(64));
        assert_eq!(policy.tunnels, Some(["tun0".to_owned()].into()));
        assert_eq!(policy.keep, Keeping::In("/srv/kept".into()));
    }

    #[test]
    fn what_is_not_understood_is_no_policy() {
        for text in [
            "user = [0]",
            "users = 'all'",
            "addresses = ['10.0.0.0/33']",
            "memory_mib_max = -1",
            "users = [0",
            "\u{0}",
        ] {
            let error = of(text).unwrap_err();
            assert!(error.help().is_some(), "{text}: {}", error.chain());
        }
        let empty = Policy {
            tunnels: Some([].into()),
            keep: Keeping::Nowhere,
            units: Some([].into()),
            ..Policy::default()
        };
        assert_eq!(of("").unwrap(), Some(empty));
    }

    #[test]
    fn a_file_that_others_can_write_to_is_not_obeyed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.toml");
        assert!(read(&path).unwrap().is_none());
        fs::write(&path, "").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert!(read(&path).unwrap_err().chain().contains("can write"));
    }
}
