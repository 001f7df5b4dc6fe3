//! What the documentation tells its reader to type does what it says.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Stdio;

use migrate_test_hosts::{Host, HostName, Lab};
use migrate_tests::migration::{no_gate_left, print_logs};
use migrate_tests::require;

/// A command of a tutorial, and where it is to be typed.
#[derive(Debug, PartialEq)]
struct Step {
    host: Option<HostName>,
    command: String,
}

/// The indented lines of a text, each on the host that was named last.
fn steps(text: &str) -> Vec<Step> {
    let mut host = None;
    let mut steps = Vec::new();
    for line in text.lines() {
        if let Some(typed) = line.strip_prefix("    ") {
            let command = typed.split(" # ").next().unwrap_or_default();
            steps.push(Step {
                host,
                command: command.trim().to_owned(),
            });
        }
        for name in [HostName::Host1, HostName::Host2, HostName::Client] {
            if line.starts_with(&format!("On `{name}`")) {
                host = Some(name);
            }
        }
    }
    steps
}

/// Types a command and expects that it succeeds; what it has said.
fn typed(host: &Host, command: &str) -> String {
    let output = host.exec(["sh", "-c", command]).unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    println!("{} # {command}\n{said}", host.name());
    if !output.status.success() {
        print_logs(host);
        panic!("{command}: {}", output.status);
    }
    said
}

#[test]
fn the_tutorial_is_true() {
    require!("the_tutorial_is_true": root, tcx, criu, migrate, redis);
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = fs::read_to_string(root.join("docs/tutorial.md")).unwrap();
    let lab = Lab::up("tutorial").unwrap();
    let client = lab.host(HostName::Client);
    let mut pid = String::new();
    let mut monitor = None;
    let mut moved_to = Vec::new();
    for Step { host, command } in steps(&text) {
        let Some(name) = host else {
            // The hosts, which are here already.
            let script = command.split(' ').next().unwrap();
            assert!(root.join(script).is_file(), "{command}");
            continue;
        };
        let host = lab.host(name);
        let command = command.replace("PID", &pid);
        if command.ends_with("monitor") {
            let mut asking = client.command("sh");
            asking.args(["-c", &format!("exec {command}")]);
            let mut asking = asking.stdout(Stdio::piped()).spawn().unwrap();
            let mut lines = BufReader::new(asking.stdout.take().unwrap()).lines();
            assert_eq!(lines.next().unwrap().unwrap(), "OK");
            monitor = Some((asking, lines));
            continue;
        }
        let said = typed(&host, &command);
        if command.starts_with("pidof") {
            said.trim().clone_into(&mut pid);
        }
        let Some((_, rest)) = command.split_once("migrate --to ") else {
            continue;
        };
        let to = rest.split(' ').next().unwrap();
        let last = said.trim_end().lines().last().unwrap_or_default();
        assert!(last.contains(&pid) && last.contains(to), "{last}");
        moved_to.push(to.to_owned());
        // As it stands in the text, within a sentence.
        let ask = "redis-cli -h 10.77.0.100 ping";
        assert!(text.contains(&format!("`{ask}`")));
        assert_eq!(typed(&client, ask).trim(), "PONG");
        let (_, lines) = monitor.as_mut().unwrap();
        let seen = lines.next().unwrap().unwrap();
        assert!(seen.to_lowercase().contains("\"ping\""), "{seen}");
        no_gate_left(&host);
    }
    assert_eq!(moved_to, ["host2", "host1"]);
    for page in ["/run/move.html", "/run/move.json"] {
        let path = lab.host(HostName::Host1).path(page);
        assert!(path.metadata().unwrap().len() > 1000, "{page}");
    }
    let (mut asking, _) = monitor.unwrap();
    assert_eq!(asking.try_wait().unwrap(), None, "the monitor is connected");
    asking.kill().unwrap();
    asking.wait().unwrap();
}

#[test]
fn commands_are_typed_where_the_text_says() {
    let text = "    scripts/up\n\nOn `host1`:\n\n    a b   # why\n\nOn `client`, too:\n\n    c\n";
    let step = |host, command: &str| Step {
        host,
        command: command.to_owned(),
    };
    let expected = [
        step(None, "scripts/up"),
        step(Some(HostName::Host1), "a b"),
        step(Some(HostName::Client), "c"),
    ];
    assert_eq!(steps(text), expected);
}
