//! A command in a guest, as a process of this machine: this executable under another name.
//!
//! Its standard streams and its exit code are the command's. When it is killed, so is the command.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{Flock, FlockArg};

use crate::agent::PORTS;
use crate::error::{Attempt, Error, Result};
use crate::wire::{self, Job, Kind, PAYLOAD_BYTES_MAX};

/// The name of the process. The prefix of the ports and the job follow.
pub(crate) const EXEC: &str = "migrate-vm-exec";

/// Where a port is.
pub(crate) fn port(prefix: &Path, number: usize) -> PathBuf {
    let mut path = prefix.as_os_str().to_owned();
    path.push(format!(".agent{number}"));
    path.into()
}

/// Runs the job and returns its exit code.
pub(crate) fn run(mut words: impl Iterator<Item = OsString>) -> Result<i32> {
    let missing = || Error::System {
        attempt: "read the command line".to_owned(),
        source: io::ErrorKind::InvalidInput.into(),
    };
    let prefix = PathBuf::from(words.next().ok_or_else(missing)?);
    let log = words
        .next()
        .and_then(|word| word.into_string().ok())
        .ok_or_else(missing)?;
    let argv = words
        .map(|word| word.into_string().map_err(|_| missing()))
        .collect::<Result<Vec<_>>>()?;
    let job = Job {
        argv,
        env: Vec::new(),
        daemon_log: (!log.is_empty()).then_some(log),
    };
    let (stream, _lock) = connect(&prefix)?;
    let session = random().attempt(|| "read /dev/urandom".to_owned())?;
    let lost = || format!("talk to {}", prefix.display());
    let text = serde_json::to_vec(&job).attempt(lost)?;
    wire::write(&stream, session, Kind::Exec, &text).attempt(lost)?;
    let stream = Arc::new(stream);
    let to = Arc::clone(&stream);
    // Ends with this process at the latest.
    std::thread::spawn(move || {
        let mut buffer = vec![0; PAYLOAD_BYTES_MAX];
        loop {
            let length = io::stdin().read(&mut buffer).unwrap_or_default();
            let sent = wire::write(&*to, session, Kind::Stdin, &buffer[..length]);
            if length == 0 || sent.is_err() {
                break;
            }
        }
    });
    let is_daemon = job.daemon_log.is_some();
    loop {
        let frame = wire::read(&*stream).attempt(lost)?;
        if frame.session != session {
            continue;
        }
        let text = || String::from_utf8_lossy(&frame.payload).into_owned();
        // Output that nobody reads any more is no reason to stop.
        match frame.kind {
            Kind::Stdout => {
                let mut stdout = io::stdout().lock();
                let _ = stdout.write_all(&frame.payload);
                let _ = stdout.flush();
            }
            Kind::Stderr => {
                let _ = io::stderr().write_all(&frame.payload);
            }
            Kind::Started if is_daemon => println!("{}", text()),
            Kind::Exit => return Ok(text().parse().unwrap_or(125)),
            Kind::Failed => {
                eprintln!("could not start {:?}: {}", job.argv, text());
                return Ok(127);
            }
            _ => {}
        }
    }
}

fn port_lock(port: &Path) -> PathBuf {
    let mut path = port.as_os_str().to_owned();
    path.push(".lock");
    path.into()
}

/// A port that nobody uses, and the lock that keeps it so.
fn connect(prefix: &Path) -> Result<(UnixStream, Flock<File>)> {
    for number in 0..PORTS {
        let path = port(prefix, number);
        let lock = port_lock(&path);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock)
            .attempt(|| format!("open {}", lock.display()))?;
        if let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            let stream =
                UnixStream::connect(&path).attempt(|| format!("connect to {}", path.display()))?;
            return Ok((stream, lock));
        }
    }
    Err(Error::System {
        attempt: format!("find a free port among {PORTS}"),
        source: io::ErrorKind::ResourceBusy.into(),
    })
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}
