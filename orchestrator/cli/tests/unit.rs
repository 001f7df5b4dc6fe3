//! The systemd units and the udev rule in `dist/` are such that systemd takes them, and their
//! commands such that this program understands them.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::io::ErrorKind;
use std::process::Command;

/// Each with how many commands it has.
const UNITS: [(&str, &str, usize); 3] = [
    (
        "migrate-agent.service",
        include_str!("../../../dist/migrate-agent.service"),
        2,
    ),
    (
        "migrate-guard.service",
        include_str!("../../../dist/migrate-guard.service"),
        1,
    ),
    (
        "migrate-resume.service",
        include_str!("../../../dist/migrate-resume.service"),
        1,
    ),
];
const RULE: &str = include_str!("../../../dist/60-migrate-guard.rules");
const INSTALLED: &str = "/usr/local/bin/migrate";
const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate");

/// Lines that are settings.
fn settings(unit: &'static str) -> impl Iterator<Item = (&'static str, &'static str)> {
    let lines = unit.lines().filter(|line| !line.starts_with('#'));
    lines.filter_map(|line| line.split_once('='))
}

#[test]
fn systemd_takes_the_units() {
    let directory = tempfile::tempdir().unwrap();
    let paths = UNITS.map(|(name, unit, _)| {
        let path = directory.path().join(name);
        fs::write(&path, unit.replace(INSTALLED, PROGRAM)).unwrap();
        path
    });
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .args(paths)
        .output();
    match verified {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("SKIP systemd_takes_the_units: systemd-analyze is not installed");
        }
        verified => {
            let verified = verified.unwrap();
            let said = String::from_utf8_lossy(&verified.stderr);
            // Of these units; others may not be in order here.
            let about_us: Vec<&str> = said
                .lines()
                .filter(|line| line.contains("migrate-"))
                .collect();
            assert!(about_us.is_empty(), "{said}");
            assert!(verified.status.success(), "{said}");
        }
    }
}

#[test]
fn nothing_is_set_that_a_copy_would_inherit() {
    let [(_, agent, _), ..] = UNITS;
    for (setting, _) in settings(agent) {
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
fn the_commands_of_the_units_are_understood() {
    for (name, unit, count) in UNITS {
        let commands: Vec<&str> = settings(unit)
            .filter(|(setting, _)| setting.starts_with("Exec"))
            .map(|(_, command)| command)
            .collect();
        assert_eq!(commands.len(), count, "{name}");
        for command in commands {
            is_understood(command);
        }
    }
}

/// `udevadm verify` came with systemd 254.
#[test]
fn udev_takes_the_rule() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("60-migrate-guard.rules");
    fs::write(&path, RULE).unwrap();
    let mut udevadm = Command::new("udevadm");
    let verified = udevadm.args(["verify", "--resolve-names=never"]).arg(&path);
    match verified.output() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            println!("SKIP udev_takes_the_rule: udevadm is not installed");
        }
        verified => {
            let verified = verified.unwrap();
            let said = String::from_utf8_lossy(&verified.stderr);
            assert!(
                verified.status.success() || said.contains("Unknown command verb"),
                "{said}"
            );
        }
    }
}

#[test]
fn the_command_of_the_rule_is_understood() {
    let (_, command) = RULE.split_once("RUN+=\"").unwrap();
    let (command, rest) = command.split_once('"').unwrap();
    assert_eq!(rest.trim(), "");
    assert!(command.ends_with(" $env{IFINDEX}"));
    is_understood(command);
}

fn is_understood(command: &str) {
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
