//! The texts of a host: `/etc/hosts`, the configuration of ssh and sshd, the keys.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Attempt, Error, Result};
use crate::layout::{HostName, STRANGER, WORKLOAD_V4, WORKLOAD_V6};

/// Where the labs of the machine keep their keys and locks.
pub(crate) const STATE: &str = "/run/migrate-hosts";
/// Where sshd says that it listens, inside a host.
pub(crate) const SSHD_PID_FILE: &str = "/run/sshd.pid";
/// The first directory of root's path on Debian, for logins of every kind.
pub const TOOLS: &str = "/usr/local/sbin";
/// Root's path, as Debian's login programs set it.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The directory of one lab.
pub(crate) fn state_dir(lab: &str) -> PathBuf {
    Path::new(STATE).join(lab)
}

/// The keys of a lab: root's own, and one per machine.
#[derive(Debug)]
pub struct Keys {
    dir: PathBuf,
}

impl Keys {
    /// Those in a directory, made there or to be made.
    #[must_use]
    pub fn in_dir(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    fn path(&self, owner: &str) -> PathBuf {
        self.dir.join(format!("{owner}_key"))
    }

    /// Makes all of them.
    ///
    /// # Errors
    ///
    /// If `ssh-keygen` is missing or fails.
    pub fn generate(&self) -> Result<()> {
        for owner in ["root", HostName::Host1.as_str(), HostName::Host2.as_str()] {
            let mut command = Command::new("ssh-keygen");
            command.args(["-q", "-t", "ed25519", "-N", "", "-C", owner, "-f"]);
            command.arg(self.path(owner)).stdin(Stdio::null());
            run(&mut command, "ssh-keygen", "openssh-client", None)?;
        }
        Ok(())
    }

    /// The private key of `root` or of a machine.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn private(&self, owner: &str) -> Result<String> {
        read(&self.path(owner))
    }

    /// The public key of `root` or of a machine.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn public(&self, owner: &str) -> Result<String> {
        read(&self.path(owner).with_extension("pub"))
    }
}

pub(crate) fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).attempt(|| format!("read {}", path.display()))
}

/// Runs a program of the machine to its end, with `input` as its standard input.
pub(crate) fn run(
    command: &mut Command,
    program: &'static str,
    package: &'static str,
    input: Option<&str>,
) -> Result<()> {
    use std::io::Write as _;

    command.stdout(Stdio::null()).stderr(Stdio::piped());
    if input.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.spawn().map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => Error::MissingProgram { program, package },
        _ => Error::System {
            attempt: format!("start {program}"),
            source,
        },
    })?;
    if let (Some(input), Some(mut stdin)) = (input, child.stdin.take()) {
        // A program that ends without reading says why on its standard error.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child
        .wait_with_output()
        .attempt(|| format!("wait for {program}"))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Program {
        command: program.to_owned(),
        status: output.status.to_string(),
        message,
    })
}

/// `/etc/hosts` of every host of a lab.
#[must_use]
pub fn hosts() -> String {
    let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost\n");
    for host in HostName::ALL {
        // The IPv6 addresses have names of their own: which of two addresses a program takes for
        // one name differs from program to program.
        let _ = writeln!(text, "{} {host}\n{} {host}-6", host.ipv4(), host.ipv6());
    }
    let _ = writeln!(text, "{} {STRANGER}", HostName::Host2.ipv4());
    let _ = writeln!(text, "{WORKLOAD_V4} workload\n{WORKLOAD_V6} workload-6");
    text
}

/// The keys of both machines, under all their names but [`STRANGER`].
///
/// # Errors
///
/// If one cannot be read.
pub fn known_hosts(keys: &Keys) -> Result<String> {
    let mut text = String::new();
    for host in HostName::ALL.into_iter().filter(|host| host.has_sshd()) {
        let (v4, v6) = (host.ipv4(), host.ipv6());
        let key = keys.public(host.as_str())?;
        let _ = writeln!(text, "{host},{host}-6,{v4},{v6} {}", key.trim());
    }
    Ok(text)
}

/// The client's side: nothing of the machine's own users gets in, and nothing is asked.
pub const SSH_CONFIG: &str = "\
Host *
    IdentityFile /etc/ssh/root_key
    IdentitiesOnly yes
    IdentityAgent none
    GlobalKnownHostsFile /etc/ssh/ssh_known_hosts
    UserKnownHostsFile /run/ssh/known_hosts
    UpdateHostKeys no
    PreferredAuthentications publickey
";

/// The server's side. `criu` is the value of `MIGRATE_CRIU`, if it is set.
#[must_use]
pub fn sshd_config(criu: Option<&str>) -> String {
    let mut text = format!(
        "\
HostKey /etc/ssh/ssh_host_ed25519_key
PidFile {SSHD_PID_FILE}
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PrintMotd no
PrintLastLog no
MaxStartups 200
MaxSessions 200
Subsystem sftp internal-sftp
"
    );
    if let Some(criu) = criu {
        let _ = writeln!(text, "SetEnv \"MIGRATE_CRIU={criu}\"");
    }
    text
}

/// `/etc/shadow` with root's account open to keys. `None` if it is already: sshd without PAM
/// refuses an account whose password starts with `!`, as it is on many images.
pub(crate) fn shadow_with_root_open(shadow: &str) -> Option<String> {
    let is_locked = |line: &str| line.starts_with("root:!");
    shadow.lines().any(is_locked).then(|| {
        let mut text = String::with_capacity(shadow.len());
        for line in shadow.lines() {
            let rest = line.splitn(3, ':').nth(2).unwrap_or_default();
            let _ = if is_locked(line) {
                writeln!(text, "root:*:{rest}")
            } else {
                writeln!(text, "{line}")
            };
        }
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_names_have_their_addresses() {
        let hosts = hosts();
        for line in ["10.77.0.1 client", "10.77.0.11 host1", "fd77::12 host2-6"] {
            assert!(hosts.lines().any(|l| l == line), "{line} not in {hosts}");
        }
        assert!(hosts.contains("10.77.0.100 workload\n"));
        assert!(hosts.contains("10.77.0.12 stranger\n"));
    }

    #[test]
    fn root_is_unlocked_and_nobody_else() {
        let shadow = "root:!*:19000:0:99999:7:::\ndaemon:!:19000:0:99999:7:::\n";
        assert_eq!(
            shadow_with_root_open(shadow).unwrap(),
            "root:*:19000:0:99999:7:::\ndaemon:!:19000:0:99999:7:::\n"
        );
        assert_eq!(shadow_with_root_open("root:*:19000:0:99999:7:::\n"), None);
    }
}
