//! What is generated from the command line's definition is taken by those who read
//! it.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::process::{Command, Output};

use migrate_core::report::{REPORT_VERSION, Report};

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate");

fn migrate(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

#[test]
fn bash_completes_verbs_and_options() {
    let script = migrate(&["completions", "bash"]);
    assert!(script.status.success(), "{script:?}");
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("migrate");
    fs::write(&file, &script.stdout).unwrap();
    let complete = |words: &str, at: usize| {
        let ask = format!(
            ". {}; COMP_WORDS=({words}); COMP_CWORD={at}; _migrate migrate \"${{COMP_WORDS[{at}]}}\" \
             \"${{COMP_WORDS[{at}-1]}}\"; echo \"${{COMPREPLY[*]}}\"",
            file.display()
        );
        let said = Command::new("bash")
            .args(["--norc", "-c", &ask])
            .output()
            .unwrap();
        assert!(said.stderr.is_empty(), "{said:?}");
        String::from_utf8(said.stdout).unwrap()
    };
    assert_eq!(complete("migrate rep", 1).trim(), "report");
    assert_eq!(complete("migrate lis", 1).trim(), "list");
    assert_eq!(complete("migrate report --ht", 2).trim(), "--html");
    assert_eq!(complete("migrate --engine s", 2).trim(), "soft-dirty");
}

#[test]
fn every_verb_has_a_manual_page() {
    let directory = tempfile::tempdir().unwrap();
    let written = migrate(&["manual", directory.path().to_str().unwrap()]);
    assert!(written.status.success(), "{written:?}");
    for (page, words) in [
        ("migrate.8", "on\\-timeout"),
        ("migrate.8", "(also: list)"),
        ("migrate-check.8", "Examine a tree"),
        ("migrate-status.8", "(also: list)"),
        ("migrate-report.8", "chrome://tracing"),
        ("migrate-agent.8", "Prometheus"),
    ] {
        let text = fs::read_to_string(directory.path().join(page)).unwrap();
        assert!(
            text.contains(words) && text.contains(".TH"),
            "{page}: {text}"
        );
    }
    // What is of no use by hand is not described.
    assert!(!directory.path().join("migrate-guard.8").exists());
    let refused = migrate(&["manual", "/nowhere"]);
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}

#[test]
fn who_wants_it_quiet_hears_errors_alone() {
    let said = |arguments: &[&str]| {
        let Output {
            status,
            stdout,
            stderr,
        } = migrate(arguments);
        let stderr = String::from_utf8(stderr).unwrap();
        (status.code(), String::from_utf8(stdout).unwrap(), stderr)
    };
    let directory = tempfile::tempdir().unwrap();
    let report = directory.path().join("report.json");
    let report = report.to_str().unwrap();
    for quiet in ["-q", "--quiet"] {
        let (code, stdout, stderr) = said(&["report", quiet, report]);
        assert_eq!((code, &*stdout), (Some(2), ""));
        assert!(
            stderr.starts_with("migrate: ") && stderr.contains(report),
            "{stderr}"
        );
    }
    let empty = Report {
        version: REPORT_VERSION,
        ..Report::default()
    };
    fs::write(report, serde_json::to_vec(&empty).unwrap()).unwrap();
    let (code, stdout, stderr) = said(&["report", report]);
    assert_eq!((code, &*stderr), (Some(0), ""));
    assert!(stdout.starts_with("migration "), "{stdout}");
    assert_eq!(
        said(&["report", "-q", report]),
        (Some(0), String::new(), String::new())
    );
}

#[test]
fn a_config_file_that_is_not_understood_stops_what_it_is_for_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("config.toml");
    fs::write(&file, "version = 1\n[migrate]\ngaol = 1\n").unwrap();
    let with = |arguments: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.env("MIGRATE_CONFIG", &file).args(arguments);
        command.output().unwrap()
    };
    for arguments in [&["--to", "h", "1"][..], &["check", "1"]] {
        let refused = with(arguments);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{said}");
        for words in [file.to_str().unwrap(), "line 3", "gaol", "help: "] {
            assert!(said.contains(words), "{words}: {said}");
        }
    }
    assert!(with(&["completions", "bash"]).status.success());
}
