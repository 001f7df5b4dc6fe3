//! The Debian package is one that dpkg takes, and what is in it works.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::path::Path;
use std::process::Command;

const XTASK: &str = env!("CARGO_BIN_EXE_xtask");

fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_package_holds_what_there_is_to_install() {
    let program = Path::new(XTASK).with_file_name("migrate");
    for (needed, there) in [
        ("a built `migrate`", program.is_file()),
        ("dpkg-deb", Path::new("/usr/bin/dpkg-deb").is_file()),
    ] {
        if !there {
            println!("SKIP the_package_holds_what_there_is_to_install: needs {needed}");
            return;
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let mut xtask = Command::new(XTASK);
    xtask.arg("dist").arg("--program").arg(&program);
    let package = said(xtask.arg("--out").arg(directory.path()));
    let package = Path::new(package.trim());
    let conffiles = said(
        Command::new("dpkg-deb")
            .arg("--info")
            .arg(package)
            .arg("conffiles"),
    );
    assert_eq!(conffiles, "/etc/migrate/config.toml\n");
    let listed = said(Command::new("dpkg-deb").arg("--contents").arg(package));
    assert!(
        listed.lines().all(|line| line.contains("root/root")),
        "{listed}"
    );

    let root = directory.path().join("unpacked");
    said(
        Command::new("dpkg-deb")
            .arg("--extract")
            .args([package, &root]),
    );
    let version = said(Command::new(root.join("usr/bin/migrate")).arg("--version"));
    assert_eq!(version, format!("migrate {}\n", env!("CARGO_PKG_VERSION")));
    for caller in [
        "usr/lib/systemd/system/migrate-agent.service",
        "usr/lib/systemd/system/migrate-guard.service",
        "usr/lib/systemd/system/migrate-resume.service",
        "usr/lib/udev/rules.d/60-migrate-guard.rules",
    ] {
        let text = fs::read_to_string(root.join(caller)).unwrap();
        assert!(
            text.contains("/usr/bin/migrate ") && !text.contains("/usr/local"),
            "{text}"
        );
    }
    let page = root.join("usr/share/man/man8/migrate-check.8.gz");
    assert!(said(Command::new("gzip").arg("-dc").arg(page)).contains(".TH migrate-check 8"));
    for completions in [
        "usr/share/bash-completion/completions/migrate",
        "usr/share/zsh/vendor-completions/_migrate",
        "usr/share/fish/vendor_completions.d/migrate.fish",
    ] {
        let text = fs::read_to_string(root.join(completions)).unwrap();
        assert!(text.contains("downtime-limit"), "{completions}");
    }
}
