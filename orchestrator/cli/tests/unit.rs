//! The systemd unit in `dist/` is one that systemd takes, and whose commands
//! this program understands.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::io::ErrorKind;
use std::process::Command;

const UNIT: &str = include_str!("../../../dist/migrate-agent.service");
const INSTALLED: &str = "/usr/local/bin/migrate";
const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate");

/// Lines that are settings.
fn settings() -> impl Iterator<Item = (&'static str, &'static str)> {
    let lines = UNIT.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('='))
}

#[test]
fn systemd_takes_the_unit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("migrate-agent.service");
    fs::write(&path, UNIT.replace(INSTALLED, PROGRAM)).unwrap();
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&path)
        .output();
    match verified {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("SKIP systemd_takes_the_unit: systemd-analyze is not installed");
        }
        verified => {
            let verified = verified.unwrap();
            let said = String::from_utf8_lossy(&verified.stderr);
            // Of this unit; others may not be in order here.
            let about_us: Vec<&str> = said
                .lines()
                .filter(|line| line.contains("migrate-agent"))
                .collect();
            assert!(about_us.is_empty(), "{said}");
            assert!(verified.status.success(), "{said}");
        }
    }
}

#[test]
fn nothing_is_set_that_a_copy_would_inherit() {
    for (setting, _) in settings() {
        for inherited in [
            "Protect",
            "Private",
            "Restrict",
            "SystemCall",
            "Capability",
            "Ambient",
            "NoNewPrivileges",
            "MemoryDeny",
            "Lock",
            "ReadOnly",
            "Inaccessible",
            "Root",
            "User",
            "DynamicUser",
        ] {
            assert!(!setting.starts_with(inherited), "{setting}");
        }
    }
}

#[test]
fn the_commands_of_the_unit_are_understood() {
    let commands: Vec<&str> = settings()
        .filter(|(setting, _)| setting.starts_with("Exec"))
        .map(|(_, command)| command)
        .collect();
    assert_eq!(commands.len(), 2);
    for command in commands {
        let mut words = command.split_whitespace();
        assert_eq!(words.next(), Some(INSTALLED));
        let help = Command::new(PROGRAM).args(words).arg("--help").output();
        assert!(help.unwrap().status.success(), "{command}");
        // `--help` alone would do for any arguments that come before it.
        let mut wrong = command.split_whitespace().skip(1).collect::<Vec<_>>();
        wrong.push("--no-such-option");
        let refused = Command::new(PROGRAM).args(wrong).output().unwrap();
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(said.contains("'--no-such-option'"), "{said}");
    }
}
