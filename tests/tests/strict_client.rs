//! The judges themselves: a clean wire is clean, and no fault goes unseen.
//!
//! Real redis, memcached, echo and web server on loopback; between them and
//! the client a relay that damages one place of one stream.

#![allow(clippy::unwrap_used, reason = "a test panics for its backtrace")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::linux::net::TcpStreamExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use migrate_tests::client::StrictClient;
use migrate_tests::hosts::eventually;
use migrate_tests::strict::Verdict;

const ECHO_SERVER: &str = env!("CARGO_BIN_EXE_echo-server");
const STRICT_CLIENT: &str = env!("CARGO_BIN_EXE_strict-client");

/// For a server to listen, on a machine that is busy.
const START_LIMIT: Duration = Duration::from_secs(60);

/// A workload on a loopback port that was free a moment ago.
struct Server {
    child: Child,
    address: SocketAddr,
    directory: Option<PathBuf>,
}

impl Server {
    /// `None` when the program is not on this machine.
    fn start(name: &str) -> Option<Self> {
        let address = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let port = address.port().to_string();
        let mut directory = None;
        let mut command = match name {
            "redis" => {
                let mut command = Command::new("redis-server");
                command.args(["--port", &port, "--bind", "127.0.0.1", "--save", ""]);
                command
            }
            "memcached" => {
                let mut command = Command::new("memcached");
                command.args(["-u", "root", "-l", "127.0.0.1", "-p", &port]);
                command
            }
            "echo" => {
                let mut command = Command::new(ECHO_SERVER);
                command.arg(address.to_string());
                command
            }
            "http" => {
                let root = std::env::temp_dir().join(format!("strict-http-{port}"));
                std::fs::create_dir(&root).unwrap();
                std::fs::write(root.join("a"), "first ".repeat(400)).unwrap();
                std::fs::write(root.join("b"), "second ".repeat(300)).unwrap();
                let mut command = Command::new("/usr/bin/python3");
                command.args(["-m", "http.server", "--protocol", "HTTP/1.1"]);
                command
                    .args(["--bind", "127.0.0.1", &port])
                    .current_dir(&root);
                directory = Some(root);
                command
            }
            other => panic!("no workload {other}"),
        };
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let server = match command.spawn() {
            Ok(child) => Self {
                child,
                address,
                directory,
            },
            Err(error) => {
                println!("SKIP {name}: {error}");
                return None;
            }
        };
        // A client would count the start of its server as a reply that is late.
        assert!(
            eventually(START_LIMIT, || TcpStream::connect(address).is_ok()),
            "{name} does not listen"
        );
        Some(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(directory) = &self.directory {
            let _ = std::fs::remove_dir_all(directory);
        }
    }
}

fn client(workload: &str, address: SocketAddr, more: &[&str]) -> StrictClient {
    let mut command = Command::new(STRICT_CLIENT);
    command.args([workload, "--addr", &address.to_string()]);
    if workload == "http" {
        command.args(["--path", "/a", "--path", "/b"]);
    }
    command.args(more);
    StrictClient::spawn(command).unwrap()
}

fn clean_run(workload: &str, more: &[&str]) {
    let Some(server) = Server::start(workload) else {
        return;
    };
    let mut client = client(workload, server.address, more);
    let before = client.snapshot().unwrap();
    let after = client.await_progress(20, Duration::from_secs(30)).unwrap();
    assert!(
        after.requests_min >= before.requests_min + 20,
        "{before:?} {after:?}"
    );
    let verdict = client.stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
    assert_eq!(verdict.workload, workload);
    assert_eq!(
        verdict.connections,
        verdict.worst_gap_us_by_connection.len()
    );
}

#[test]
fn redis_on_a_clean_wire_is_clean() {
    clean_run("redis", &["--connections", "20"]);
}

#[test]
fn memcached_on_a_clean_wire_is_clean() {
    clean_run("memcached", &["--connections", "20"]);
}

#[test]
fn echo_on_a_clean_wire_is_clean() {
    clean_run("echo", &["--connections", "200"]);
}

#[test]
fn http_on_a_clean_wire_is_clean() {
    clean_run("http", &["--connections", "5"]);
}

#[test]
fn keys_are_read_back_and_a_changed_and_a_lost_one_are_found() {
    let Some(server) = Server::start("redis") else {
        return;
    };
    let keys = ["--keys", "5000", "--populate", "--verify"];
    let verdict = client("redis", server.address, &keys).stop().unwrap();
    assert!(verdict.is_clean(), "{verdict:?}");
    assert_eq!(verdict.keys_verified, 5000);

    let client = client("redis", server.address, &["--keys", "5000", "--verify"]);
    let mut other = TcpStream::connect(server.address).unwrap();
    other
        .write_all(b"DEL key:17\r\nSET key:4999 x\r\n")
        .unwrap();
    let mut replies = [0; 9];
    other.read_exact(&mut replies).unwrap();
    assert_eq!(&replies, b":1\r\n+OK\r\n");
    let verdict = client.stop().unwrap();
    assert_eq!((verdict.errors, verdict.lost), (2, 1), "{verdict:?}");
    assert!(verdict.first_errors[0].contains("key:17"), "{verdict:?}");
}

/// What the relay does, once, to one direction of its first connection.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// Leaves bytes out.
    Drop(usize),
    /// Sends bytes again.
    Double(usize),
    /// Changes one bit.
    Flip,
    /// Holds everything back.
    Delay(Duration),
    /// Resets the client's connection.
    Reset,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    ToServer,
    ToClient,
}

/// Waits for its trigger, so that a test decides when the fault comes.
struct Relay {
    address: SocketAddr,
    trigger: Arc<AtomicBool>,
}

impl Relay {
    fn start(server: SocketAddr, fault: Fault, way: Way) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let trigger = Arc::new(AtomicBool::new(false));
        let armed = Arc::clone(&trigger);
        thread::spawn(move || {
            let (client, _) = listener.accept().unwrap();
            let server = TcpStream::connect(server).unwrap();
            client.set_nodelay(true).unwrap();
            server.set_nodelay(true).unwrap();
            let never = Arc::new(AtomicBool::new(false));
            let of = |here: Way| Arc::clone(if here == way { &armed } else { &never });
            let (up, down) = (of(Way::ToServer), of(Way::ToClient));
            let (client2, server2) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            thread::spawn(move || pump(&client2, &server2, fault, &up));
            pump(&server, &client, fault, &down);
        });
        Self { address, trigger }
    }
}

/// Where in a chunk the fault strikes: inside a message, wherever its pieces
/// begin.
const STRIKE_AT: usize = 5;

fn pump(mut from: &TcpStream, mut to: &TcpStream, fault: Fault, armed: &AtomicBool) {
    let mut chunk = vec![0; 64 * 1024];
    let mut is_web_server = false;
    while let Ok(count) = from.read(&mut chunk) {
        // Python's headers and body are two writes, and Nagle's algorithm holds
        // the second until the first is acknowledged.
        let _ = from.set_quickack(true);
        if count == 0 {
            break;
        }
        let mut out = chunk[..count].to_vec();
        // Python sends headers and body apart; a message is both.
        let is_head = out.starts_with(b"HTTP/");
        is_web_server |= is_head;
        let is_message = count > STRIKE_AT + 4 && is_head == is_web_server;
        if is_message && armed.swap(false, Ordering::SeqCst) {
            if is_head && out.ends_with(b"\r\n\r\n") {
                let more = from.read(&mut chunk).unwrap_or(0);
                out.extend_from_slice(&chunk[..more]);
            }
            let count = out.len();
            let whole = |wanted: usize| {
                if wanted == WHOLE {
                    0..count
                } else {
                    STRIKE_AT..STRIKE_AT + wanted
                }
            };
            match fault {
                Fault::Drop(bytes) => drop(out.drain(whole(bytes))),
                Fault::Double(bytes) => {
                    let range = whole(bytes);
                    let again = out[range.clone()].to_vec();
                    out.splice(range.end..range.end, again);
                }
                Fault::Flip => out[STRIKE_AT] ^= 0x10,
                Fault::Delay(time) => thread::sleep(time),
                Fault::Reset => {
                    // An unread request at close makes the kernel send RST;
                    // both ends see the connection go.
                    let _ = from.shutdown(Shutdown::Both);
                    let _ = to.shutdown(Shutdown::Both);
                    return;
                }
            }
        }
        if to.write_all(&out).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

/// Whole chunks: the relay's pieces, which are whole messages here.
const WHOLE: usize = 0;

/// Runs a client through the relay, lets the fault strike, and takes the
/// verdict.
fn verdict_with(workload: &str, fault: Fault, way: Way) -> Option<Verdict> {
    let server = Server::start(workload)?;
    let relay = Relay::start(server.address, fault, way);
    let timeout = REPLY_TIMEOUT_MS.to_string();
    let mut client = client(workload, relay.address, &["--reply-timeout-ms", &timeout]);
    client.await_progress(50, Duration::from_secs(30)).unwrap();
    assert_eq!(client.snapshot().unwrap().errors, 0);
    relay.trigger.store(true, Ordering::SeqCst);
    // Either it goes on after the fault or it has lost its only connection.
    let _ = client.await_progress(50, Duration::from_millis(2 * REPLY_TIMEOUT_MS));
    let verdict = client.stop().unwrap();
    println!(
        "{workload} {fault:?} {way:?}: {verdict} {:?}",
        verdict.first_errors
    );
    Some(verdict)
}

/// A reply that has not come by then is lost; one that does come, on a busy
/// machine, has come.
const REPLY_TIMEOUT_MS: u64 = 1500;

const BOTH: [Way; 2] = [Way::ToServer, Way::ToClient];

/// The workloads side by side: their clients mostly wait.
fn for_each_workload(test: impl Fn(&str) + Sync) {
    thread::scope(|scope| {
        for workload in ["redis", "memcached", "echo", "http"] {
            let test = &test;
            scope.spawn(move || test(workload));
        }
    });
}

#[test]
fn a_lost_message_is_lost() {
    for_each_workload(|workload| {
        for way in BOTH {
            if let Some(verdict) = verdict_with(workload, Fault::Drop(WHOLE), way) {
                assert!(verdict.lost >= 1 && verdict.errors >= 1, "{verdict:?}");
            }
        }
    });
}

#[test]
fn a_doubled_message_is_doubled() {
    for_each_workload(|workload| {
        for way in BOTH {
            if let Some(verdict) = verdict_with(workload, Fault::Double(WHOLE), way) {
                assert!(verdict.doubled >= 1 && verdict.errors >= 1, "{verdict:?}");
            }
        }
    });
}

#[test]
fn one_byte_less_or_more_or_another_is_an_error() {
    for_each_workload(|workload| {
        for way in BOTH {
            for fault in [Fault::Drop(1), Fault::Double(1), Fault::Flip] {
                if let Some(verdict) = verdict_with(workload, fault, way) {
                    assert!(
                        verdict.errors >= 1,
                        "{workload} {fault:?} {way:?}: {verdict:?}"
                    );
                }
            }
        }
    });
}

#[test]
fn a_connection_that_ends_is_an_error_and_is_not_opened_again() {
    for_each_workload(|workload| {
        if let Some(verdict) = verdict_with(workload, Fault::Reset, Way::ToClient) {
            assert!(verdict.lost >= 1, "{verdict:?}");
            assert_eq!(verdict.errors, verdict.lost, "{verdict:?}");
        }
    });
}

#[test]
fn a_delay_is_the_worst_gap_and_no_error() {
    let delay = Duration::from_millis(300);
    for_each_workload(|workload| {
        if let Some(verdict) = verdict_with(workload, Fault::Delay(delay), Way::ToClient) {
            assert!(verdict.is_clean(), "{verdict:?}");
            assert!(verdict.worst_gap_us >= 300_000, "{verdict:?}");
        }
    });
}
