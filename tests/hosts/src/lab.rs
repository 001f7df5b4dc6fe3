//! A set of hosts: up, found again, down.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read as _};
use std::ops::Deref;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::unistd::geteuid;

use crate::error::{Attempt, Error, Result};
use crate::files::{self, Keys};
use crate::helper::{INIT, InitArgs};
use crate::host::Host;
use crate::layout::{HostName, INTERFACE, Member};
use crate::{cgroup, processes};

/// A host is up within 300 ms as a rule; this is for a machine under load.
const START_WITHIN: Duration = Duration::from_secs(20);
/// The file that says that all hosts of a lab have come up.
const READY: &str = "ready";
/// An init's report is two short lines; a longer one is cut.
const REPORT_BYTES_MAX: u64 = 64 * 1024;

/// The name of a lab: 1 to 32 of the characters a-z, 0-9 and `-`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LabName(String);

impl FromStr for LabName {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if (1..=32).contains(&name.len()) && name.chars().all(is_plain) && !name.starts_with('-') {
            Ok(Self(name.to_owned()))
        } else {
            Err(Error::BadLabName {
                name: name.to_owned(),
            })
        }
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One set of hosts that is up. Several of them can be up side by side.
///
/// Dropping it leaves the hosts up; see [`Lab::scoped`] for the other way.
#[derive(Clone, Debug)]
pub struct Lab {
    name: LabName,
    inits: BTreeMap<HostName, i32>,
    /// The init of the bridge between them.
    switch: i32,
}

impl Lab {
    /// Brings a lab up, or finds it if it is up already. A lab of which a part has died (a host,
    /// or an sshd) is made anew.
    ///
    /// # Errors
    ///
    /// If the caller is not root, a program is missing, or the system refuses something; then
    /// nothing is left behind.
    pub fn up(name: &str) -> Result<Self> {
        let name = check(name)?;
        let _lock = Lock::exclusive(&name)?;
        if let Some(lab) = Self::find(&name)? {
            let mut machines = HostName::ALL.into_iter().filter(|host| host.has_sshd());
            if machines.all(|host| lab.host(host).has_live_sshd()) {
                return Ok(lab);
            }
        }
        take_down(&name)?;
        match Self::build(&name) {
            Ok(lab) => Ok(lab),
            Err(error) => {
                // The first failure is the one to tell.
                let _ = take_down(&name);
                Err(error)
            }
        }
    }

    /// Finds a lab that is up, or coming up.
    ///
    /// # Errors
    ///
    /// [`Error::NotUp`] if it is not, or not as a whole.
    pub fn attach(name: &str) -> Result<Self> {
        let name = check(name)?;
        // Whoever brings it up just now holds the lock.
        let _lock = Lock::shared(&name)?;
        Self::find(&name)?.ok_or_else(|| Error::NotUp {
            lab: name.to_string(),
        })
    }

    /// Takes a lab down: its processes, namespaces, mounts, interfaces, cgroups and keys are gone
    /// when this returns. Nothing happens if it is not up.
    ///
    /// # Errors
    ///
    /// If something could not be ended in time.
    pub fn down(name: &str) -> Result<()> {
        let name = check(name)?;
        let lock = Lock::exclusive(&name)?;
        take_down(&name)?;
        lock.remove();
        Ok(())
    }

    /// Brings a fresh lab up (one of the same name is taken down before) for as long as the guard
    /// lives, also when that ends with a panic.
    ///
    /// # Errors
    ///
    /// As [`Lab::up`] and [`Lab::down`].
    pub fn scoped(name: &str) -> Result<LabGuard> {
        Self::down(name)?;
        Ok(LabGuard {
            lab: Self::up(name)?,
        })
    }

    /// The lab's name.
    #[must_use]
    pub fn name(&self) -> &LabName {
        &self.name
    }

    /// One of its hosts.
    #[must_use]
    pub fn host(&self, name: HostName) -> Host {
        Host {
            lab: self.name.to_string(),
            name,
            init: self.inits[&name],
        }
    }

    /// Lets every link of the lab carry packets of `mtu` bytes, in all hosts and the bridge
    /// between them.
    ///
    /// # Errors
    ///
    /// If `ip` cannot be run or refuses.
    pub fn set_mtu(&self, mtu: u32) -> Result<()> {
        let interfaces = |host: HostName| (self.inits[&host], INTERFACE.to_owned());
        let ports = |host: HostName| (self.switch, host.to_string());
        let all = HostName::ALL
            .into_iter()
            .flat_map(|host| [interfaces(host), ports(host)]);
        for (init, interface) in all {
            let mut member = self.host(HostName::Client);
            member.init = init;
            let output = member.in_network(|| {
                Command::new("ip")
                    .args(["link", "set", &interface, "mtu", &mtu.to_string()])
                    .output()
            })?;
            let output = output.attempt(|| "run ip".to_owned())?;
            if !output.status.success() {
                return Err(Error::System {
                    attempt: format!("set the MTU of {interface}"),
                    source: io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()),
                });
            }
        }
        Ok(())
    }

    /// The lab, if all of it is there.
    fn find(name: &LabName) -> Result<Option<Self>> {
        let found = processes::inits(&name.0)?;
        let is_whole = Member::ALL
            .iter()
            .all(|member| matches!(found.get(member), Some(Some(_))));
        if !is_whole || !files::state_dir(&name.0).join(READY).exists() {
            return Ok(None);
        }
        let switch = found.get(&Member::Switch).copied().flatten();
        let hosts = found.into_iter().filter_map(|(member, pid)| match member {
            Member::Host(host) => Some((host, pid?)),
            Member::Switch => None,
        });
        Ok(Some(Self {
            name: name.clone(),
            inits: hosts.collect(),
            switch: switch.unwrap_or_default(),
        }))
    }

    fn build(name: &LabName) -> Result<Self> {
        let state_dir = files::state_dir(&name.0);
        DirBuilder::new()
            .mode(0o700)
            .create(&state_dir)
            .attempt(|| format!("make the directory {}", state_dir.display()))?;
        Keys::in_dir(&state_dir).generate()?;

        let deadline = Instant::now() + START_WITHIN;
        let switch = Starting::begin(name, Member::Switch, None)?.finish(deadline)?;
        let starting: Vec<_> = HostName::ALL
            .into_iter()
            .map(|host| {
                Ok((
                    host,
                    Starting::begin(name, Member::Host(host), Some(switch))?,
                ))
            })
            .collect::<Result<_>>()?;
        let mut inits = BTreeMap::new();
        for (host, member) in starting {
            inits.insert(host, member.finish(deadline)?);
        }
        let ready = state_dir.join(READY);
        fs::write(&ready, "").attempt(|| format!("write {}", ready.display()))?;
        Ok(Self {
            name: name.clone(),
            inits,
            switch,
        })
    }
}

/// A [`Lab`] that is taken down with this value.
#[derive(Debug)]
pub struct LabGuard {
    lab: Lab,
}

impl Deref for LabGuard {
    type Target = Lab;

    fn deref(&self) -> &Lab {
        &self.lab
    }
}

impl Drop for LabGuard {
    fn drop(&mut self) {
        // A second panic would hide the first.
        if let Err(error) = Lab::down(&self.lab.name.0) {
            eprintln!(
                "could not take lab `{}` down: {}",
                self.lab.name,
                error.chain()
            );
        }
    }
}

fn check(name: &str) -> Result<LabName> {
    let name = name.parse()?;
    if geteuid().is_root() {
        Ok(name)
    } else {
        Err(Error::NotRoot)
    }
}

fn take_down(name: &LabName) -> Result<()> {
    processes::kill_all(&name.0)?;
    cgroup::remove(&name.0)?;
    let state_dir = files::state_dir(&name.0);
    match fs::remove_dir_all(&state_dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).attempt(|| format!("remove {}", state_dir.display()))
        }
        _ => Ok(()),
    }
}

/// A member on its way up.
struct Starting {
    lab: String,
    member: Member,
    process: Child,
    report: ChildStdout,
}

impl Starting {
    fn begin(name: &LabName, member: Member, switch: Option<i32>) -> Result<Self> {
        let (programs, migrate) = programs()?;
        let args = InitArgs {
            lab: name.to_string(),
            member,
            state_dir: files::state_dir(&name.0),
            switch,
            programs,
            migrate,
        };
        let mut command = Command::new("/proc/self/exe");
        command.arg0(INIT).args(args.to_words()).current_dir("/");
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let procs = cgroup::create(&name.0, member).and_then(|path| cgroup::procs_file(&path));
        if let Some(procs) = procs {
            // SAFETY: `join` is async-signal-safe and borrows only what it was given.
            unsafe {
                command.pre_exec(move || cgroup::join(&procs));
            }
        }
        let mut process = command
            .spawn()
            .attempt(|| format!("start the init of {}", member.as_str()))?;
        let report = process.stdout.take().ok_or_else(|| Error::System {
            attempt: "read the report of an init".to_owned(),
            source: io::ErrorKind::BrokenPipe.into(),
        })?;
        Ok(Self {
            lab: name.to_string(),
            member,
            process,
            report,
        })
    }

    /// Waits until it is up. Returns the PID of its init.
    fn finish(mut self, deadline: Instant) -> Result<i32> {
        let report = self.read_report(deadline);
        // Its work is done with the report, or hopeless; its child is the init.
        if report.is_err() {
            let _ = self.process.kill();
        }
        let _ = self.process.wait();
        let report = report?;
        let pid = report
            .lines()
            .find_map(|line| line.strip_prefix("pid ")?.parse().ok());
        match pid {
            Some(pid) if report.lines().any(|line| line == "ready") => Ok(pid),
            _ => {
                let message = report
                    .lines()
                    .find_map(|line| line.strip_prefix("error: "))
                    .unwrap_or("its init ended without a word")
                    .to_owned();
                Err(Error::Start {
                    lab: self.lab,
                    member: self.member.as_str(),
                    message,
                })
            }
        }
    }

    /// All that the helper and the init say, up to the moment when both have closed the pipe.
    fn read_report(&mut self, deadline: Instant) -> Result<String> {
        let mut text = String::new();
        let mut bytes = Vec::new();
        while u64::try_from(bytes.len()).unwrap_or(u64::MAX) < REPORT_BYTES_MAX {
            if !processes::readable_by(&self.report, deadline)? {
                let what = format!("`{}` of lab `{}` up", self.member.as_str(), self.lab);
                return Err(Error::Deadline {
                    what,
                    limit: START_WITHIN,
                });
            }
            let mut buffer = [0; 4096];
            let read = self
                .report
                .read(&mut buffer)
                .attempt(|| "read the report of an init".to_owned())?;
            if read == 0 {
                break;
            }
            bytes.extend_from_slice(&buffer[..read]);
        }
        text.push_str(&String::from_utf8_lossy(&bytes));
        Ok(text)
    }
}

/// The directory of the programs under test, and the `migrate` among them: `MIGRATE_BIN`, or the
/// one that was built beside this executable.
fn programs() -> Result<(PathBuf, PathBuf)> {
    let own = std::env::current_exe().attempt(|| "find the running executable".to_owned())?;
    let mut directory = own.parent().unwrap_or(Path::new("/")).to_owned();
    // Cargo puts tests in `deps` and examples in `examples`.
    if directory.ends_with("deps") || directory.ends_with("examples") {
        directory.pop();
    }
    let migrate = match std::env::var_os("MIGRATE_BIN") {
        Some(path) => std::path::absolute(&path).attempt(|| "find MIGRATE_BIN".to_owned())?,
        None => directory.join("migrate"),
    };
    Ok((directory, migrate))
}

/// The right to look at a lab (shared) or to change it (exclusive), among all processes.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn exclusive(name: &LabName) -> Result<Self> {
        let path = Self::path(name);
        let attempt = || format!("lock {}", path.display());
        loop {
            match DirBuilder::new().mode(0o700).create(files::STATE) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(error).attempt(attempt);
                }
                _ => {}
            }
            let mut options = OpenOptions::new();
            let file = match options.create(true).append(true).mode(0o600).open(&path) {
                // Another `down` has just removed the directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                file => file.attempt(attempt)?,
            };
            file.lock().attempt(attempt)?;
            // The one that had it may have removed the file: then this lock means nothing.
            let held = file.metadata().attempt(attempt)?;
            let is_current = |now: Metadata| (now.dev(), now.ino()) == (held.dev(), held.ino());
            if fs::metadata(&path).is_ok_and(is_current) {
                return Ok(Self { path, _file: file });
            }
        }
    }

    /// `None` if nobody has ever brought the lab up, or it was taken down.
    fn shared(name: &LabName) -> Result<Option<Self>> {
        let path = Self::path(name);
        let attempt = || format!("lock {}", path.display());
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.attempt(attempt)?,
        };
        file.lock_shared().attempt(attempt)?;
        Ok(Some(Self { path, _file: file }))
    }

    fn path(name: &LabName) -> PathBuf {
        Path::new(files::STATE).join(format!("{name}.lock"))
    }

    /// Gives the lock up and leaves no file.
    fn remove(self) {
        let _ = fs::remove_file(&self.path);
        // Other labs may be in there.
        let _ = fs::remove_dir(files::STATE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_labs_are_plain_words() {
        for good in ["demo", "test-17", "a"] {
            assert_eq!(good.parse::<LabName>().unwrap().to_string(), good);
        }
        for bad in ["", "-x", "a/b", "..", "A", "a b", &"x".repeat(33)] {
            assert!(bad.parse::<LabName>().is_err(), "{bad}");
        }
    }
}
