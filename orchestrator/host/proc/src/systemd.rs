//! The host's systemd, asked and told through its own commands.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::error::ProcError;
use crate::read;

/// Is there where systemd runs the host's services (sd_booted(3)).
pub(crate) const BOOTED: &str = "/run/systemd/system";
/// Between two looks at what only tells when asked.
pub(crate) const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// Whether systemd runs this host's services. A container may see the directory of
/// the host around it.
pub(crate) fn is_booted() -> bool {
    Path::new(BOOTED).is_dir() && read::name(1) == "systemd"
}

/// What `systemctl` answers to these arguments.
pub(crate) fn systemctl(arguments: &[&str]) -> Result<String, ProcError> {
    let mut command = Command::new("systemctl");
    command.args(arguments);
    output(command, None)
}

/// Properties of a unit, by name; those that it has not are missing.
pub(crate) fn show(unit: &str, properties: &str) -> Result<BTreeMap<String, String>, ProcError> {
    let text = systemctl(&["show", "-p", properties, "--", unit])?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect())
}

/// What a command prints when it succeeds; it is killed after `limit`, if there is
/// one. What it prints has to fit a pipe.
pub(crate) fn output(mut command: Command, limit: Option<Duration>) -> Result<String, ProcError> {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let failed = |reason: String| ProcError::Command {
        command: words.join(" "),
        reason,
    };
    let deadline = limit.map(|limit| Instant::now() + limit);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    while let Some(deadline) = deadline
        && child
            .try_wait()
            .map_err(|error| failed(error.to_string()))?
            .is_none()
    {
        if Instant::now() >= deadline {
            // It may have ended by now, which is as good.
            let _ = child.kill();
            let _ = child.wait();
            let seconds = limit.unwrap_or_default().as_secs();
            return Err(failed(format!("no end within {seconds} s")));
        }
        std::thread::sleep(LOOK_INTERVAL);
    }
    let output = child
        .wait_with_output()
        .map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(failed(format!("{}: {}", output.status, said.trim())));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The directory of a unit's drop-ins that last until the next boot.
pub(crate) fn runtime_drop_ins(unit: &str) -> PathBuf {
    Path::new(BOOTED).join(format!("{unit}.d"))
}

/// Writes a drop-in and has systemd read it; when systemd does not, nothing is left
/// behind.
pub(crate) fn drop_in(path: &Path, text: &str) -> Result<(), ProcError> {
    let failed = |attempt, path: &Path, source| ProcError::Write {
        attempt,
        path: path.to_owned(),
        source,
    };
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(|e| failed("create", directory, e))?;
    }
    // Whole at once, for whoever reads it meanwhile. systemd looks at no such name.
    let part = path.with_extension("part");
    std::fs::write(&part, text).map_err(|e| failed("write", &part, e))?;
    if let Err(error) = std::fs::rename(&part, path) {
        let _ = std::fs::remove_file(&part);
        return Err(failed("write", path, error));
    }
    match systemctl(&["daemon-reload"]) {
        Ok(_) => Ok(()),
        Err(error) => {
            // The first failure is the one to tell.
            let _ = withdraw(path);
            Err(error)
        }
    }
}

/// Removes a drop-in, if it is there, and has systemd read what is left.
pub(crate) fn withdraw(path: &Path) -> Result<(), ProcError> {
    read::removed(std::fs::remove_file(path), path)?;
    if let Some(directory) = path.parent() {
        // Not empty: it has drop-ins of somebody else.
        let _ = std::fs::remove_dir(directory);
    }
    systemctl(&["daemon-reload"]).map(drop)
}

/// Where services tell systemd how they are (sd_notify(3)).
const NOTIFY_SOCKET: &str = "/run/systemd/notify";
/// systemd answers within 5 s, or `systemd-notify` gives up.
const NOTIFY_LIMIT: Duration = Duration::from_secs(10);

/// Has systemd wait no more for a unit's signs of life, until the unit ends. It takes that
/// from the unit's own main process only, in whose name root may speak; a drop-in counts
/// from the next start on.
pub(crate) fn stop_watchdog(unit: &str) -> Result<(), ProcError> {
    let look = || show(unit, "MainPID,WatchdogUSec,SubState");
    let value = |shown: &BTreeMap<String, String>, name| -> String {
        shown.get(name).cloned().unwrap_or_default()
    };
    let is_off = |shown: &BTreeMap<String, String>| {
        matches!(value(shown, "WatchdogUSec").as_str(), "" | "0" | "infinity")
    };
    let mut shown = look()?;
    if is_off(&shown) {
        return Ok(());
    }
    let pid = format!("--pid={}", value(&shown, "MainPID"));
    let mut command = Command::new("systemd-notify");
    command
        .env("NOTIFY_SOCKET", NOTIFY_SOCKET)
        .args([pid.as_str(), "WATCHDOG_USEC=0"]);
    let said = output(command, Some(NOTIFY_LIMIT));
    // What counts is what systemd makes of it.
    shown = look()?;
    let state = value(&shown, "SubState");
    let ends = state.starts_with("stop") || state.starts_with("final");
    if is_off(&shown) && !ends {
        return Ok(());
    }
    said?;
    Err(ProcError::Command {
        command: format!("systemd-notify {pid} WATCHDOG_USEC=0"),
        reason: format!(
            "{unit} has WatchdogUSec={} and is {state}",
            value(&shown, "WatchdogUSec")
        ),
    })
}
