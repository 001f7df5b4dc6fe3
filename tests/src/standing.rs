//! Standing agents in test hosts, and what lets sources in.
//!
//! The functions here panic with all that is known, as assertions do.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use migrate_test_hosts::{Authority, Host, HostName, LabGuard};

use crate::hosts::{eventually, listens};

/// The standing agents' port, at each host.
pub const PORT: u16 = 7070;
/// What belongs to the authority, at each host.
const CERTIFICATES: &str = "/srv/tls";
/// An agent listens at once.
const LISTENS_WITHIN: Duration = Duration::from_secs(20);

/// Gives each of these hosts a certificate of one authority, in its own name.
///
/// # Panics
///
/// When that cannot be done.
#[track_caller]
pub fn certify(lab: &LabGuard, names: &[HostName]) {
    let made = tempfile::tempdir().and_then(|directory| {
        let hosts = names.iter().map(|name| lab.host(*name));
        certify_in(directory.path(), hosts)
    });
    if let Err(error) = made {
        panic!("could not certify the hosts: {error}");
    }
}

fn certify_in(directory: &Path, hosts: impl Iterator<Item = Host>) -> io::Result<()> {
    let authority = Authority::in_dir(directory).map_err(io::Error::other)?;
    for host in hosts {
        let (cert, key) = authority
            .certify(host.name().as_str())
            .map_err(io::Error::other)?;
        fs::create_dir_all(host.path(CERTIFICATES))?;
        for file in [authority.ca(), cert, key] {
            let name = file.file_name().unwrap_or_default();
            fs::copy(&file, host.path(CERTIFICATES).join(name))?;
        }
    }
    Ok(())
}

/// `--ca`, `--cert` and `--key` of a host that was certified.
#[must_use]
pub fn options(name: HostName) -> [String; 6] {
    let at = |end: &str| format!("{CERTIFICATES}/{end}");
    let [ca, cert, key] = ["--ca", "--cert", "--key"].map(str::to_owned);
    [
        ca,
        at("ca.pem"),
        cert,
        at(&format!("{name}.cert")),
        key,
        at(&format!("{name}.key")),
    ]
}

/// The command line that moves a tree from one host to the agent on another,
/// without the PID.
#[must_use]
pub fn words(from: HostName, to: HostName) -> Vec<String> {
    let mut words = options(from).to_vec();
    words.extend(["--to".to_owned(), format!("{to}:{PORT}")]);
    words
}

/// Starts an agent in a host that was certified; its PID there.
///
/// # Panics
///
/// When it does not come up.
#[track_caller]
#[must_use]
pub fn start(host: &Host) -> i32 {
    start_with(host, &[])
}

/// The same with further options.
///
/// # Panics
///
/// When it does not come up.
#[track_caller]
#[must_use]
pub fn start_with(host: &Host, more: &[&str]) -> i32 {
    let listen = format!("{}:{PORT}", host.ipv4());
    let options = options(host.name());
    let argv = ["migrate", "agent", "--listen", &listen]
        .into_iter()
        .chain(options.iter().map(String::as_str))
        .chain(more.iter().copied());
    let pid = match host.spawn_detached(argv, "/srv/agent.log") {
        Ok(pid) => pid,
        Err(error) => panic!("{}", error.chain()),
    };
    let up = eventually(LISTENS_WITHIN, || listens(host, PORT));
    let name = host.name();
    assert!(up, "the agent on {name}, PID {pid}, does not listen");
    pid
}
