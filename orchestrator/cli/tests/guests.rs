//! A standing agent serves so many at a time, whoever they are.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use migrate_channel::{Connection, Destination, TlsFiles, connect};
use migrate_core::wire::Message;
use migrate_test_hosts::Authority;
use nix::unistd::geteuid;

/// `SERVED_MAX` of `migrate agent`.
const SERVED_MAX: usize = 64;
/// A connection, an answer.
const WITHIN: Duration = Duration::from_secs(20);

/// Ends with the test.
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn who_comes_when_too_many_are_there_is_told() {
    if !geteuid().is_root() {
        println!("SKIP who_comes_when_too_many_are_there_is_told: needs root");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let authority = Authority::in_dir(directory.path()).unwrap();
    let files = |name: &str| {
        let (cert, key) = authority.certify(name).unwrap();
        TlsFiles {
            ca: authority.ca(),
            cert,
            key,
        }
    };
    let server = files("localhost");
    let mut agent = Command::new(env!("CARGO_BIN_EXE_migrate"));
    agent
        .args(["agent", "--listen", "127.0.0.1:0"])
        .arg("--ca")
        .arg(&server.ca)
        .arg("--cert")
        .arg(&server.cert)
        .arg("--key")
        .arg(&server.key)
        .stdout(Stdio::piped());
    let mut agent = Agent(agent.spawn().unwrap());
    let mut said = String::new();
    BufReader::new(agent.0.stdout.take().unwrap())
        .read_line(&mut said)
        .unwrap();
    let (_, port) = said.trim().rsplit_once(':').unwrap();
    let to = Destination::parse(&format!("localhost:{port}"), Some(files("host1"))).unwrap();
    let guest = |number: usize| {
        let (to, hello) = (&to, migrate_session::hello(&format!("guest-{number}")));
        async move { connect(to, hello, WITHIN).await.unwrap() }
    };

    let mut guests: Vec<Connection> = Vec::new();
    for number in 0..SERVED_MAX {
        guests.push(guest(number).await);
    }
    let mut late = guest(SERVED_MAX).await;
    let answer = late.receiver.control(WITHIN).await.unwrap();
    let Message::Failed(failed) = answer else {
        panic!("{answer:?}");
    };
    assert!(failed.message.contains("64 connections"), "{failed:?}");

    // Where they have left, others are served.
    drop(guests);
    let begun = Instant::now();
    for number in 1.. {
        let mut next = guest(SERVED_MAX + number).await;
        let migration_id = format!("guest-{}", SERVED_MAX + number);
        let _ = next
            .sender
            .control(&Message::Verdict { migration_id })
            .await;
        match next.receiver.control(WITHIN).await.unwrap() {
            Message::VerdictIs(_) => break,
            Message::Failed(_) => assert!(begun.elapsed() < WITHIN, "still {SERVED_MAX}"),
            other => panic!("{other:?}"),
        }
    }
}
