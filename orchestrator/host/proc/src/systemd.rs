//! The host's systemd, asked and told through its own commands.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

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
    put_in_place(path, text)?;
    match systemctl(&["daemon-reload"]) {
        Ok(_) => Ok(()),
        Err(error) => {
            // The first failure is the one to tell.
            let _ = withdraw(path);
            Err(error)
        }
    }
}

fn put_in_place(path: &Path, text: &str) -> Result<(), ProcError> {
    let failed = |attempt, path: &Path, source| ProcError::Write {
        attempt,
        path: path.to_owned(),
        source,
    };
    let _alone = alone()?;
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory).map_err(|e| failed("create", directory, e))?;
    }
    // Whole at once, for whoever reads it meanwhile. systemd looks at no such name.
    let part = path.with_extension("part");
    std::fs::write(&part, text).map_err(|e| failed("write", &part, e))?;
    std::fs::rename(&part, path).map_err(|error| {
        let _ = std::fs::remove_file(&part);
        failed("write", path, error)
    })
}

/// Removes a drop-in, if it is there, and has systemd read what is left.
pub(crate) fn withdraw(path: &Path) -> Result<(), ProcError> {
    // Where there is no systemd, nobody else writes any.
    take_away(path, alone().ok())?;
    systemctl(&["daemon-reload"]).map(drop)
}

/// Removes a drop-in that still says what it did when it was looked at, and has systemd read
/// what is left; whether it did.
pub(crate) fn withdraw_same(path: &Path, text: &str) -> Result<bool, ProcError> {
    let alone = alone()?;
    if read::text(path).unwrap_or_default() != text {
        return Ok(false);
    }
    take_away(path, Some(alone))?;
    systemctl(&["daemon-reload"]).map(|_| true)
}

fn take_away(path: &Path, _alone: Option<Flock<File>>) -> Result<(), ProcError> {
    read::removed(std::fs::remove_file(path), path)?;
    if let Some(directory) = path.parent() {
        // Not empty: it has drop-ins of somebody else.
        let _ = std::fs::remove_dir(directory);
    }
    Ok(())
}

/// Nobody else of ours puts a drop-in in place or takes one away meanwhile. Held for single
/// calls only, so nobody waits for long.
fn alone() -> Result<Flock<File>, ProcError> {
    let lock = || {
        let directory = File::open(BOOTED)?;
        Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| errno.into())
    };
    lock().map_err(|source| ProcError::Write {
        attempt: "lock",
        path: BOOTED.into(),
        source,
    })
}

/// Where services tell systemd how they are (sd_notify(3)).
const NOTIFY_SOCKET: &str = "/run/systemd/notify";
/// systemd answers within 5 s, or `systemd-notify` gives up.
const NOTIFY_LIMIT: Duration = Duration::from_secs(10);

/// Has systemd wait this long for a unit's signs of life, or no more at all, until the unit
/// ends. It takes that from the unit's own main process only, in whose name root may speak; a
/// drop-in counts from the next start on. A unit without one has nothing to be told.
pub(crate) fn set_watchdog(unit: &str, watchdog: Option<u64>) -> Result<(), ProcError> {
    let look = || show(unit, "MainPID,WatchdogUSec,SubState");
    let mut shown = look()?;
    let main = shown.remove("MainPID").unwrap_or_default();
    if matches!(main.as_str(), "" | "0") || watchdog_us(unit, &shown)? == watchdog {
        return Ok(());
    }
    let wanted = [
        format!("--pid={main}"),
        format!("WATCHDOG_USEC={}", watchdog.unwrap_or(0)),
    ];
    let mut command = Command::new("systemd-notify");
    command.env("NOTIFY_SOCKET", NOTIFY_SOCKET).args(&wanted);
    let said = output(command, Some(NOTIFY_LIMIT));
    // What counts is what systemd makes of it.
    shown = look()?;
    let state = shown.get("SubState").map_or("", String::as_str);
    let ends = state.starts_with("stop") || state.starts_with("final");
    if watchdog_us(unit, &shown)? == watchdog && !ends {
        return Ok(());
    }
    said?;
    Err(ProcError::Command {
        command: format!("systemd-notify {}", wanted.join(" ")),
        reason: format!(
            "{unit} has WatchdogUSec={} and is {state}",
            shown.get("WatchdogUSec").map_or("", String::as_str)
        ),
    })
}

/// The watchdog among a unit's properties; `None` where it has none or none that counts.
pub(crate) fn watchdog_us(
    unit: &str,
    shown: &BTreeMap<String, String>,
) -> Result<Option<u64>, ProcError> {
    match shown.get("WatchdogUSec").map_or("", String::as_str) {
        "" | "0" | "infinity" => Ok(None),
        span => span_us(span).map(Some).ok_or_else(|| ProcError::Command {
            command: format!("systemctl show {unit}"),
            reason: format!("WatchdogUSec={span}, which is no time"),
        }),
    }
}

/// A time span as systemd writes it, `1min 2.500s` (systemd.time(7), `format_timespan` of
/// `src/basic/time-util.c`), in microseconds.
fn span_us(text: &str) -> Option<u64> {
    /// Places behind the point down to a microsecond, of which no unit has more.
    const PLACES: usize = 12;
    let mut sum: u64 = 0;
    for part in text.split_ascii_whitespace() {
        let unit = part.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let number = part.strip_suffix(unit)?;
        let unit_us: u64 = match unit {
            "us" => 1,
            "ms" => 1_000,
            "s" => 1_000_000,
            "min" => 60_000_000,
            "h" => 3_600_000_000,
            "d" => 86_400_000_000,
            "w" => 7 * 86_400_000_000,
            // 30.44 and 365.25 days.
            "month" => 2_629_800_000_000,
            "y" => 31_557_600_000_000,
            _ => return None,
        };
        let (whole, rest) = number.split_once('.').unwrap_or((number, ""));
        if rest.len() > PLACES {
            return None;
        }
        sum = sum.checked_add(whole.parse::<u64>().ok()?.checked_mul(unit_us)?)?;
        let mut place_us = unit_us;
        for digit in rest.chars() {
            place_us /= 10;
            sum = sum.checked_add(u64::from(digit.to_digit(10)?) * place_us)?;
        }
    }
    (sum > 0).then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_as_systemd_writes_them() {
        for (text, us) in [
            ("3s", 3_000_000),
            ("1min 30s", 90_000_000),
            ("1min 2.500s", 62_500_000),
            ("1.000250s", 1_000_250),
            ("500ms", 500_000),
            ("12us", 12),
            (
                "1month 1d 2h",
                2_629_800_000_000 + 86_400_000_000 + 7_200_000_000,
            ),
        ] {
            assert_eq!(span_us(text), Some(us), "{text}");
        }
        for odd in [
            "",
            "s",
            "3",
            "3 s",
            "1.2.3s",
            "-1s",
            "99999999999999999999y",
            "[not set]",
        ] {
            assert_eq!(span_us(odd), None, "{odd}");
        }
    }
}
