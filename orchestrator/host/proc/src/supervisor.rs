//! Who would start a second copy when the source's tree ends.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use migrate_core::preflight::Finding;
use serde::{Deserialize, Serialize};

use crate::error::ProcError;
use crate::systemd::{self, LOOK_INTERVAL};
use crate::tree::{self, Tree};
use crate::{cgroup, read};

/// Parents that only wait for what they started: looked through, bounded.
const PASS_THROUGH: [&str; 6] = ["sudo", "su", "runuser", "doas", "timeout", "setpriv"];
/// How many of those may stand between a supervisor and the tree.
const PASS_THROUGH_MAX: u32 = 8;
/// Programs whose purpose is to start again what ended, besides runit's.
const SUPERVISORS: [&str; 12] = [
    "s6-supervise",
    "supervise",
    "supervise-daemo", // `supervise-daemon`, cut to the 15 bytes of a comm
    "supervisord",
    "svscan",
    "daemon",
    "monit",
    "circusd",
    "conmon",
    "containerd-shim",
    "dinit",
    "nomad",
];
const SHELLS: [&str; 9] = [
    "sh", "bash", "dash", "ash", "busybox", "zsh", "ksh", "mksh", "fish",
];
/// Larger scripts are not read through for a loop.
const SCRIPT_MAX_BYTES: u64 = 1 << 20;
/// How long a unit may take to notice that its main process has gone.
const UNIT_WAIT_MAX: Duration = Duration::from_secs(10);
/// File name of the drop-in that keeps a unit down. Drop-ins count in the order of
/// their names, whatever directory they are in, and the last one wins: an
/// `override.conf` of `systemctl edit` must not give back its `Restart=`.
const DROP_IN: &str = "zzz-migrate-hold-down.conf";
/// And of the one beside it that keeps systemd from ending what is left of the tree.
const KEEP: &str = "zzz-migrate-keep.conf";

/// Something that may start the workload again when it ends on the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Supervisor {
    /// A unit of the system's systemd.
    SystemdUnit {
        /// Its name, such as `redis-server.service`.
        unit: String,
        /// Its `Restart=`, `no` included.
        restart: String,
        /// How long it may give systemd no sign of life; `None` where nobody waits for one.
        watchdog_us: Option<u64>,
    },
    /// A scope of the system's systemd: it starts nothing, but can be stopped.
    SystemdScope {
        /// Its name, such as `redis-server.migrated.scope`.
        unit: String,
    },
    /// A runit service.
    Runit {
        /// PID of `runsv`.
        pid: i32,
        /// The service directory.
        service: String,
    },
    /// A shell that runs a script with a loop.
    ShellLoop {
        /// The shell's PID.
        pid: i32,
        /// Its `comm`.
        comm: String,
    },
    /// Another program known to start again what ended.
    Other {
        /// Its PID.
        pid: i32,
        /// Its `comm`.
        comm: String,
    },
}

/// Looks for what would start a second copy of the tree: the unit it is the
/// main process of, or a parent that supervises. An interactive shell, an
/// init and a login do not. Where there is none, the scope that the tree is in.
///
/// # Errors
/// When /proc cannot be read, or systemd does not answer.
pub fn supervisor(tree: &Tree) -> Result<Option<Supervisor>, ProcError> {
    let path = unit_path(tree)?;
    if let Some(found) = starts_again(tree, path.as_deref())? {
        return Ok(Some(found));
    }
    let scope = path.as_deref().and_then(|path| unit_of(path, ".scope"));
    Ok(scope.map(|unit| Supervisor::SystemdScope { unit: unit.into() }))
}

fn starts_again(tree: &Tree, path: Option<&str>) -> Result<Option<Supervisor>, ProcError> {
    if let Some(unit) = systemd_unit(tree, path)? {
        return Ok(Some(unit));
    }
    let ours = tree::own_ancestors()?;
    let mut pid = tree.processes.first().map_or(0, |root| root.parent);
    for _ in 0..PASS_THROUGH_MAX {
        // PID 1 restarts only what it has a unit for; what started this very
        // command waits for it and cannot be restarting the tree meanwhile.
        if pid <= 1 || ours.contains(&pid) {
            return Ok(None);
        }
        let Some(stat) = read::stat(pid)? else {
            return Ok(None);
        };
        let arguments = read::arguments(pid);
        let program = program(&stat.name, &arguments);
        if PASS_THROUGH.contains(&program.as_str()) {
            pid = stat.parent;
            continue;
        }
        let comm = stat.name.clone();
        return Ok(if program == "runsv" {
            let service = service_directory(pid, &arguments);
            // Told to leave it down when it ends (`sv once`).
            (!wants_down(Path::new(&service))).then_some(Supervisor::Runit { pid, service })
        } else if SUPERVISORS.iter().any(|known| program == *known)
            || program.starts_with("containerd-shim")
            || program.starts_with("PM2 ")
        {
            Some(Supervisor::Other { pid, comm })
        } else if SHELLS.contains(&program.as_str())
            && restarts(pid, &arguments, stat.terminal != 0)
        {
            Some(Supervisor::ShellLoop { pid, comm })
        } else {
            None
        });
    }
    Ok(None)
}

/// A program's name: its comm, or for an interpreter the script's name.
fn program(comm: &str, arguments: &[String]) -> String {
    if comm.starts_with("python") || comm.starts_with("node") || comm.starts_with("ruby") {
        let script = arguments.iter().skip(1).find(|a| !a.starts_with('-'));
        if let Some(name) = script.and_then(|path| path.rsplit('/').next()) {
            return name.to_owned();
        }
    }
    comm.trim_start_matches('-').to_owned()
}

/// The directory of a runit service, as `sv` takes it.
fn service_directory(pid: i32, arguments: &[String]) -> String {
    let given = arguments.get(1).map_or("", String::as_str);
    if given.starts_with('/') {
        return given.to_owned();
    }
    match read::link(read::of(pid, "cwd")) {
        Ok(directory) => directory,
        Err(_) => given.to_owned(),
    }
}

/// Whether `runsv` leaves a service down when it ends, by the file in which it
/// keeps its state: byte 17 is `u` or `d` for what is wanted (runit 2.1.2,
/// `src/runsv.c`, `update_status`).
fn wants_down(service: &Path) -> bool {
    const BYTES: usize = 20;
    const WANTED: usize = 17;
    std::fs::read(service.join("supervise/status"))
        .is_ok_and(|status| status.len() == BYTES && status.get(WANTED) == Some(&b'd'))
}

/// Whether a shell may start its child again: it runs a script with a loop in
/// it, or one that cannot be read. At a terminal without one, a person does.
fn restarts(pid: i32, arguments: &[String], has_terminal: bool) -> bool {
    let mut rest = arguments.iter().skip(1).map(String::as_str);
    // busybox is told which of its programs to be.
    let mut script = None;
    while let Some(argument) = rest.next() {
        match argument {
            "sh" | "ash" if script.is_none() => {}
            "-o" | "+o" | "-O" | "--rcfile" | "--init-file" => {
                rest.next();
            }
            "-s" | "-" => break,
            flags if flags.starts_with("--") => {}
            flags if flags.starts_with('-') && flags.contains('c') => {
                return rest.next().is_none_or(has_loop);
            }
            flags if flags.starts_with('-') || flags.starts_with('+') => {}
            file => {
                script = Some(file);
                break;
            }
        }
    }
    match script {
        None => !has_terminal,
        Some(file) => {
            let path = if file.starts_with('/') {
                PathBuf::from(file)
            } else {
                read::of(pid, "cwd").join(file)
            };
            let small = std::fs::metadata(&path)
                .is_ok_and(|meta| meta.is_file() && meta.len() <= SCRIPT_MAX_BYTES);
            // What cannot be read may well loop.
            !small || read::text(&path).map_or(true, |text| has_loop(&text))
        }
    }
}

/// Whether a shell text has a loop in it, outside comments.
fn has_loop(text: &str) -> bool {
    text.lines()
        .map(|line| line.split(" #").next().unwrap_or(line).trim_start())
        .filter(|line| !line.starts_with('#'))
        .flat_map(|line| line.split(|c: char| !c.is_alphanumeric() && c != '_' && c != '-'))
        .any(|word| matches!(word, "while" | "until" | "for"))
}

/// The cgroup by which systemd, where it is init, knows the tree's unit.
fn unit_path(tree: &Tree) -> Result<Option<String>, ProcError> {
    if read::name(1) != "systemd" {
        return Ok(None);
    }
    let paths = cgroup::paths(tree.root())?;
    let path = paths
        .iter()
        .find(|(controllers, _)| controllers == "name=systemd")
        .or_else(|| paths.iter().find(|(controllers, _)| controllers.is_empty()));
    Ok(path.map(|(_, path)| cgroup::without_fence(path).to_owned()))
}

/// The unit whose main process the tree has.
fn systemd_unit(tree: &Tree, path: Option<&str>) -> Result<Option<Supervisor>, ProcError> {
    let Some(unit) = path.and_then(|path| unit_of(path, ".service")) else {
        return Ok(None);
    };
    let mut shown = systemd::show(unit, "Id,Restart,MainPID,WatchdogUSec")?;
    let main: i32 = shown
        .get("MainPID")
        .and_then(|pid| pid.parse().ok())
        .unwrap_or(0);
    if main != 0 && !tree.pids().contains(&main) {
        // Only the end of the main process makes systemd act.
        return Ok(None);
    }
    Ok(Some(Supervisor::SystemdUnit {
        unit: shown.remove("Id").unwrap_or_else(|| unit.to_owned()),
        restart: shown.remove("Restart").unwrap_or_else(|| "no".to_owned()),
        watchdog_us: systemd::watchdog_us(unit, &shown)?,
    }))
}

/// The system's unit of a kind that a cgroup path belongs to; a login has none.
fn unit_of<'a>(path: &'a str, kind: &str) -> Option<&'a str> {
    if cgroup::is_login(path) {
        return None;
    }
    path.split('/').rfind(|part| part.ends_with(kind))
}

/// The line for the preflight table: a note where the tool itself keeps the
/// supervisor from acting ([`hold_down`]), a refusal where the user has to.
#[must_use]
pub fn supervisor_finding(supervisor: &Supervisor) -> Finding {
    let ignore = "or go on with --supervisor ignore";
    match supervisor {
        Supervisor::SystemdUnit { unit, restart, .. } if restart == "no" => Finding::note(
            format!("unit {unit}"),
            "runs the tree and will show it as ended on this host",
            "",
        ),
        Supervisor::SystemdScope { unit } => Finding::ok(
            format!("unit {unit}"),
            "holds the tree and ends with it on this host",
        ),
        Supervisor::SystemdUnit { unit, restart, .. } => Finding::note(
            format!("unit {unit}"),
            format!("would start a second copy (Restart={restart}); it is kept down meanwhile"),
            format!("to keep it down after a reboot as well: systemctl disable {unit}"),
        ),
        Supervisor::Runit { pid, service } => Finding::refused(
            format!("runsv (PID {pid})"),
            format!("would start a second copy of service {service}"),
            format!("run `sv once {service}` first, which leaves it running, {ignore}"),
        ),
        Supervisor::ShellLoop { pid, comm } => Finding::refused(
            format!("{comm} (PID {pid})"),
            "started the tree from a script and may start a second copy when it ends here",
            format!(
                "end the script with `kill {pid}` (the tree goes on), name PID {pid} to move it \
                 along, {ignore}"
            ),
        ),
        Supervisor::Other { pid, comm } => Finding::refused(
            format!("{comm} (PID {pid})"),
            "supervises the tree and may start a second copy when it ends here",
            format!("tell it to leave the service alone, {ignore}"),
        ),
    }
}

/// What a journal has to keep of a unit that is held down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldDownRecord {
    /// The unit.
    pub unit: String,
    /// The drop-in that was written.
    pub drop_in: PathBuf,
    /// The watchdog that the unit gets back when it goes on, if it has one.
    #[serde(default)]
    pub watchdog_us: Option<u64>,
}

impl HoldDownRecord {
    fn is_scope(&self) -> bool {
        self.unit.ends_with(".scope")
    }

    /// The drop-in of [`HoldDown::keep`], if there is one.
    fn keeping(&self) -> PathBuf {
        self.drop_in.with_file_name(KEEP)
    }
}

/// A supervisor that was told not to start the tree again.
#[derive(Debug)]
#[must_use = "a unit stays held down until it is released"]
pub struct HoldDown {
    record: Option<HoldDownRecord>,
}

/// Keeps a systemd unit from restarting the tree, by a drop-in that lasts
/// until [`HoldDown::release`] or the next boot, and its watchdog from ending the tree,
/// which cannot give signs of life while it stands still. Other supervisors cannot be
/// told, and nothing is done.
///
/// # Errors
/// When the drop-in cannot be written or systemd does not take it; nothing is
/// left behind then.
pub fn hold_down(supervisor: &Supervisor) -> Result<HoldDown, ProcError> {
    let held = HoldDown {
        record: HoldDown::plan(supervisor),
    };
    match &held.record {
        Some(record) if !record.is_scope() => match restarts_no_more(record) {
            Ok(()) => Ok(held),
            Err(error) => {
                // The first failure is the one to tell.
                let _ = held.release();
                Err(error)
            }
        },
        _ => Ok(held),
    }
}

fn restarts_no_more(record: &HoldDownRecord) -> Result<(), ProcError> {
    let HoldDownRecord { unit, drop_in, .. } = record;
    systemd::drop_in(drop_in, "[Service]\nRestart=no\n")?;
    // What counts is what systemd makes of it.
    let restart = systemd::show(unit, "Restart")?.remove("Restart");
    if restart.as_deref() != Some("no") {
        return Err(ProcError::Command {
            command: format!("systemctl show {unit}"),
            reason: format!(
                "Restart={} in spite of {}",
                restart.unwrap_or_default(),
                drop_in.display()
            ),
        });
    }
    match record.watchdog_us {
        Some(_) => systemd::set_watchdog(unit, None),
        None => Ok(()),
    }
}

impl HoldDown {
    /// What [`hold_down`] is about to make, for a journal that is written
    /// first; changes nothing. What was never made can be released by it.
    #[must_use]
    pub fn plan(supervisor: &Supervisor) -> Option<HoldDownRecord> {
        let (unit, watchdog_us) = match supervisor {
            Supervisor::SystemdUnit {
                unit, watchdog_us, ..
            } => (unit, *watchdog_us),
            Supervisor::SystemdScope { unit } => (unit, None),
            _ => return None,
        };
        Some(HoldDownRecord {
            unit: unit.clone(),
            drop_in: systemd::runtime_drop_ins(unit).join(DROP_IN),
            watchdog_us,
        })
    }

    /// What a journal has to keep; `None` when nothing was done.
    #[must_use]
    pub fn record(&self) -> Option<HoldDownRecord> {
        self.record.clone()
    }

    /// Takes over from another process.
    pub fn from_record(record: Option<HoldDownRecord>) -> Self {
        Self { record }
    }

    /// Gives the supervisor back its own settings after a rollback: the tree
    /// still runs here.
    ///
    /// # Errors
    /// When the drop-in cannot be removed or systemd does not answer.
    pub fn release(self) -> Result<(), ProcError> {
        let removed = self.remove();
        match &self.record {
            Some(record) if record.watchdog_us.is_some() => {
                let watched = systemd::set_watchdog(&record.unit, record.watchdog_us);
                removed.and(watched)
            }
            _ => removed,
        }
    }

    /// Gives the supervisor back its own setting after the tree has gone, not
    /// before systemd has seen that it has: the setting of that moment decides
    /// whether it restarts.
    ///
    /// # Errors
    /// As [`HoldDown::release`]; when systemd takes too long to notice, the
    /// drop-in stays.
    pub fn release_after_end(self) -> Result<(), ProcError> {
        let Some(record) = &self.record else {
            return Ok(());
        };
        // Whatever systemd makes of the end, an operator may act on the unit again.
        let kept = record.keeping();
        if kept.exists() {
            systemd::withdraw(&kept)?;
        }
        let deadline = Instant::now() + UNIT_WAIT_MAX;
        loop {
            let state = systemd::show(&record.unit, "ActiveState")?
                .remove("ActiveState")
                .unwrap_or_default();
            if matches!(state.as_str(), "inactive" | "failed") {
                return self.remove();
            }
            if Instant::now() >= deadline {
                return Err(ProcError::Command {
                    command: format!("systemctl show {}", record.unit),
                    reason: format!("the unit is still {state}"),
                });
            }
            std::thread::sleep(LOOK_INTERVAL);
        }
    }

    /// Keeps systemd from ending the tree, which still has memory that its copy lacks: by
    /// `systemctl stop` or `restart`, or for its age. Lasts until the unit is released.
    ///
    /// # Errors
    /// When a drop-in cannot be written or systemd does not take it.
    pub fn keep(&self) -> Result<(), ProcError> {
        let Some(record) = &self.record else {
            return Ok(());
        };
        // That one counts for a unit that is active already, too.
        let kind = if record.is_scope() {
            "Scope"
        } else {
            "Service"
        };
        let text = format!("[Unit]\nRefuseManualStop=yes\n[{kind}]\nRuntimeMaxSec=infinity\n");
        systemd::drop_in(&record.keeping(), &text)
    }

    fn remove(&self) -> Result<(), ProcError> {
        let Some(record) = &self.record else {
            return Ok(());
        };
        let kept = record.keeping();
        read::removed(std::fs::remove_file(&kept), &kept)?;
        systemd::withdraw(&record.drop_in)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split('|').map(str::to_owned).collect()
    }

    #[test]
    fn which_shells_may_restart() {
        let own = read::own_pid();
        let may = |line: &str, terminal| restarts(own, &words(line), terminal);
        assert!(may("sh|-c|while :; do redis-server; done", false));
        assert!(may("bash|-ec|until x; do :; done", true));
        assert!(!may("sh|-c|redis-server; echo over", false));
        assert!(!may("-bash", true), "a login shell at a terminal");
        assert!(!may("bash|-i", true));
        assert!(may("sh", false), "a script from standard input");
        assert!(may("bash|/does/not/exist", true), "an unreadable script");
        assert!(may("busybox|sh|-c|while :; do x; done", false));
        assert!(!may("bash|--rcfile|/x", true));
    }

    #[test]
    fn a_service_that_stays_down_is_not_supervised() {
        let directory = tempfile::tempdir().unwrap();
        assert!(!wants_down(directory.path()), "nothing is known");
        let supervise = directory.path().join("supervise");
        std::fs::create_dir(&supervise).unwrap();
        for (wanted, down) in [(b'u', false), (b'd', true)] {
            let mut status = [0; 20];
            status[17] = wanted;
            std::fs::write(supervise.join("status"), status).unwrap();
            assert_eq!(wants_down(directory.path()), down);
            std::fs::write(supervise.join("status"), &status[..18]).unwrap();
            assert!(!wants_down(directory.path()), "of another form");
        }
    }

    #[test]
    fn loops_in_comments_are_none() {
        assert!(!has_loop(
            "# for the record\nredis-server # while it lasts\n"
        ));
        assert!(has_loop("x=1\nwhile true\ndo redis-server\ndone"));
        assert!(!has_loop("redis-server --logfile forward.log; meanwhile"));
    }

    #[test]
    fn units_of_paths() {
        let service = |path| unit_of(path, ".service");
        assert_eq!(
            service("/system.slice/redis-server.service"),
            Some("redis-server.service")
        );
        assert_eq!(service("/system.slice/x.service/sub"), Some("x.service"));
        assert_eq!(service("/system.slice/ssh.service"), None);
        assert_eq!(service("/system.slice/x.scope"), None);
        assert_eq!(service("/"), None);
        let scope = |path| unit_of(path, ".scope");
        assert_eq!(scope("/user.slice/user-0.slice/session-1.scope"), None);
        assert_eq!(
            scope("/system.slice/x.migrated.scope"),
            Some("x.migrated.scope")
        );
    }

    #[test]
    fn what_the_tool_can_do_itself_is_no_refusal() {
        let unit = Supervisor::SystemdUnit {
            unit: "x.service".into(),
            restart: "always".into(),
            watchdog_us: None,
        };
        let finding = supervisor_finding(&unit);
        assert_eq!(finding.severity, migrate_core::preflight::Severity::Note);
        assert!(finding.finding.contains("Restart=always"));
        let shell = Supervisor::ShellLoop {
            pid: 7,
            comm: "sh".into(),
        };
        let finding = supervisor_finding(&shell);
        assert_eq!(finding.severity, migrate_core::preflight::Severity::Refused);
        assert!(finding.way_out.contains("--supervisor ignore"));
    }
}
