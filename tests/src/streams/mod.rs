//! Clients whose connections are filled by one side, or last for one request.
//!
//! They run in the test's own process, on sockets of the client host, for as
//! long as [`Running`] lives, and count; [`Running::stop`] is their verdict.

pub mod wire;

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use migrate_test_hosts::Host;

use self::wire::{Numbers, RECEIPT_BYTES, Tally};
use crate::hosts::eventually;

/// A peer that takes or gives nothing for this long is lost: longer than a
/// migration with every retransmission.
const IO_TIMEOUT: Duration = Duration::from_secs(30);

/// What a client does, over and over or on and on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Sends without end, and holds the server's digest against its own.
    Upload,
    /// Receives without end, and holds every byte against what is due.
    Download,
    /// A new connection for every request; the server closes it.
    Storm,
    /// A new connection for every request; the client closes it.
    PoliteStorm,
    /// A new connection for every reply of a megabyte, which the server has
    /// closed long before it is read.
    BigStorm,
    /// Closes its own side at once, and receives for some seconds; over and over.
    HalfClosed,
    /// Subscribes with redis and counts what comes without having been asked.
    Subscribe,
}

/// What some clients have seen.
#[derive(Debug, Default)]
struct Seen {
    stop: AtomicBool,
    /// Bytes, or replies of connections of their own.
    progress: AtomicU64,
    longest_us: AtomicU64,
    failures: Mutex<Vec<String>>,
}

impl Seen {
    fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn went_on(&self, by: usize, since: &mut Instant) {
        let now = Instant::now();
        let took = now - std::mem::replace(since, now);
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.longest_us.fetch_max(took_us, Ordering::Relaxed);
        self.progress.fetch_add(by as u64, Ordering::Relaxed);
    }

    fn failures(&self) -> Vec<String> {
        self.failures
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Clients that are at it.
#[derive(Debug)]
pub struct Running {
    kind: Kind,
    seen: Arc<Seen>,
    threads: Vec<JoinHandle<()>>,
}

/// How they ended.
#[derive(Debug, Clone)]
pub struct Verdict {
    /// What they did.
    pub kind: Kind,
    /// Bytes that went over, or replies for storms.
    pub progress: u64,
    /// The longest time without any.
    pub longest: Duration,
    /// What was not as it must be.
    pub failures: Vec<String>,
}

impl Running {
    /// Starts `clients` of them on a host, and waits until each connection is
    /// there and something goes over.
    ///
    /// # Errors
    ///
    /// A connection cannot be opened.
    pub fn start(kind: Kind, clients: usize, host: &Host, to: SocketAddr) -> io::Result<Self> {
        let mut running = Self {
            kind,
            seen: Arc::new(Seen::default()),
            threads: Vec::new(),
        };
        for number in 0..clients {
            let seen = Arc::clone(&running.seen);
            // Threads inherit the network that they are started in.
            let thread = host
                .in_network(|| {
                    thread::Builder::new().spawn(move || {
                        if let Err(error) = run(kind, number as u64, to, &seen) {
                            seen.failures
                                .lock()
                                .unwrap_or_else(PoisonError::into_inner)
                                .push(format!("client {number}: {error}"));
                        }
                    })
                })
                .map_err(io::Error::other)??;
            running.threads.push(thread);
        }
        running.goes_on(clients as u64)?;
        Ok(running)
    }

    /// Waits until something more has gone over.
    ///
    /// # Errors
    ///
    /// It does not, or something has failed.
    pub fn goes_on(&self, more: u64) -> io::Result<()> {
        let goal = self.seen.progress.load(Ordering::Relaxed) + more;
        let reached = || self.seen.progress.load(Ordering::Relaxed) >= goal;
        let went_on = eventually(IO_TIMEOUT, || reached() || !self.seen.failures().is_empty());
        let failures = self.seen.failures();
        if !failures.is_empty() {
            return Err(io::Error::other(failures.join("; ")));
        }
        if went_on {
            Ok(())
        } else {
            Err(io::ErrorKind::TimedOut.into())
        }
    }

    /// Forgets how long nothing came so far: the start of a connection is no
    /// pause of the server's.
    pub fn forget_pauses(&self) {
        self.seen.longest_us.store(0, Ordering::Relaxed);
    }

    /// Ends them in peace.
    #[must_use]
    pub fn stop(mut self) -> Verdict {
        self.seen.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                let failed = "a client panicked".to_owned();
                let mut failures = self
                    .seen
                    .failures
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                failures.push(failed);
            }
        }
        Verdict {
            kind: self.kind,
            progress: self.seen.progress.load(Ordering::Relaxed),
            longest: Duration::from_micros(self.seen.longest_us.load(Ordering::Relaxed)),
            failures: self.seen.failures(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.seen.stop.store(true, Ordering::Relaxed);
    }
}

fn run(kind: Kind, number: u64, to: SocketAddr, seen: &Seen) -> io::Result<()> {
    match kind {
        Kind::Upload => upload(number, to, seen),
        Kind::Download => download(number, to, seen),
        Kind::Storm => storm(wire::REQUEST, wire::REPLY_BYTES, number, to, seen),
        Kind::PoliteStorm => storm(wire::POLITE_REQUEST, wire::REPLY_BYTES, number, to, seen),
        Kind::BigStorm => storm(wire::BIG_REQUEST, wire::BIG_REPLY_BYTES, number, to, seen),
        Kind::HalfClosed => half_closed(number, to, seen),
        Kind::Subscribe => subscribe(number, to, seen),
    }
}

fn connect(to: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to, IO_TIMEOUT)
        .map_err(|error| io::Error::new(error.kind(), format!("connect: {error}")))?;
    stream.set_read_timeout(Some(IO_TIMEOUT))?;
    stream.set_write_timeout(Some(IO_TIMEOUT))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Some of a stream, but no whole number of packets.
const CHUNK_BYTES: usize = 40_000;

fn upload(number: u64, to: SocketAddr, seen: &Seen) -> io::Result<()> {
    let mut stream = connect(to)?;
    stream.write_all(&wire::head(wire::UPLOAD, number))?;
    let (mut numbers, mut sent) = (Numbers::new(number), Tally::default());
    let mut chunk = vec![0; CHUNK_BYTES];
    let mut since = Instant::now();
    while !seen.is_stopped() {
        numbers.fill(&mut chunk);
        sent.write_all(&chunk)?;
        stream.write_all(&chunk)?;
        seen.went_on(chunk.len(), &mut since);
    }
    stream.shutdown(Shutdown::Write)?;
    let mut receipt = Vec::new();
    stream.read_to_end(&mut receipt)?;
    let sent = sent.receipt();
    if receipt == sent.bytes() {
        Ok(())
    } else {
        Err(wrong(&format!(
            "{} bytes were sent, others came",
            sent.bytes
        )))
    }
}

fn download(number: u64, to: SocketAddr, seen: &Seen) -> io::Result<()> {
    let mut stream = connect(to)?;
    stream.write_all(&wire::head(wire::DOWNLOAD, number))?;
    let (mut numbers, mut came) = (Numbers::new(number), Tally::default());
    let (mut chunk, mut due) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    // The last bytes are the receipt; which they are is known at the end.
    let mut waiting = Vec::new();
    let mut since = Instant::now();
    let mut told = false;
    loop {
        if seen.is_stopped() && !told {
            told = true;
            stream.shutdown(Shutdown::Write)?;
        }
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            break;
        }
        seen.went_on(count, &mut since);
        waiting.extend_from_slice(&chunk[..count]);
        let whole = waiting.len().saturating_sub(RECEIPT_BYTES) / 8 * 8;
        due.resize(whole, 0);
        numbers.fill(&mut due);
        if due != waiting[..whole] {
            return Err(wrong(&format!(
                "other bytes than due before number {}",
                numbers.bytes()
            )));
        }
        came.write_all(&due)?;
        waiting.drain(..whole);
    }
    if waiting == came.receipt().bytes() {
        Ok(())
    } else {
        Err(wrong("the stream has ended before its end"))
    }
}

/// Who closes first keeps the port for a minute: a client may not have more
/// connections in that time than ports.
const POLITE_PAUSE: Duration = Duration::from_millis(5);

fn storm(kind: u8, bytes: usize, client: u64, to: SocketAddr, seen: &Seen) -> io::Result<()> {
    let mut due = vec![0; bytes];
    for number in client << 32.. {
        let mut since = Instant::now();
        let mut stream = connect(to)?;
        stream.write_all(&wire::head(kind, number))?;
        let mut reply = vec![0; bytes];
        let mut read = 0;
        while read < bytes {
            // A slow reader: what the server has written waits in its kernel.
            if kind == wire::BIG_REQUEST {
                thread::sleep(Duration::from_micros(500));
            }
            let end = bytes.min(read + CHUNK_BYTES);
            read += match stream.read(&mut reply[read..end])? {
                0 => return Err(wrong(&format!("the reply ends after {read} bytes"))),
                count => count,
            };
        }
        if kind == wire::POLITE_REQUEST {
            stream.shutdown(Shutdown::Write)?;
            thread::sleep(POLITE_PAUSE);
        }
        if stream.read(&mut [0])? != 0 {
            return Err(wrong("more came than the reply"));
        }
        Numbers::new(number).fill(&mut due);
        if reply != due {
            return Err(wrong("the reply is another one"));
        }
        drop(stream);
        seen.went_on(1, &mut since);
        if seen.is_stopped() {
            break;
        }
    }
    Ok(())
}

fn half_closed(client: u64, to: SocketAddr, seen: &Seen) -> io::Result<()> {
    for number in client << 32.. {
        let mut stream = connect(to)?;
        stream.write_all(&wire::head(wire::HALF_CLOSED, number))?;
        stream.shutdown(Shutdown::Write)?;
        let mut numbers = Numbers::new(number);
        let (mut chunk, mut due) = (
            vec![0; wire::HALF_CHUNK_BYTES],
            vec![0; wire::HALF_CHUNK_BYTES],
        );
        let mut since = Instant::now();
        for _ in 0..wire::HALF_CHUNKS {
            stream.read_exact(&mut chunk)?;
            numbers.fill(&mut due);
            if chunk != due {
                return Err(wrong("other bytes than due"));
            }
            seen.went_on(chunk.len(), &mut since);
        }
        if stream.read(&mut [0])? != 0 {
            return Err(wrong("more came than was due"));
        }
        if seen.is_stopped() {
            break;
        }
    }
    Ok(())
}

/// Between two messages of a publisher.
const PUBLISH_PAUSE: Duration = Duration::from_millis(1);

/// Subscribes over one connection to what it publishes over another.
fn subscribe(number: u64, to: SocketAddr, seen: &Seen) -> io::Result<()> {
    let (mut publisher, mut subscriber) = (connect(to)?, connect(to)?);
    write!(subscriber, "SUBSCRIBE {number}\r\n")?;
    let mut pushed = BufReader::new(subscriber);
    expect_push(&mut pushed, "subscribe", number, ":1")?;
    thread::scope(|scope| {
        let told = scope.spawn(move || {
            let mut answers = BufReader::new(publisher.try_clone()?);
            let mut count = 0_u64;
            loop {
                let message = if seen.is_stopped() {
                    "end".to_owned()
                } else {
                    count.to_string()
                };
                write!(publisher, "PUBLISH {number} {message}\r\n")?;
                let mut answer = String::new();
                answers.read_line(&mut answer)?;
                // One subscriber has got it.
                if answer != ":1\r\n" {
                    return Err(wrong(&format!("PUBLISH was answered with {answer:?}")));
                }
                if message == "end" {
                    return Ok(count);
                }
                count += 1;
                thread::sleep(PUBLISH_PAUSE);
            }
        });
        let (mut next, mut since) = (0_u64, Instant::now());
        let outcome = loop {
            let due = next.to_string();
            match push(&mut pushed, "message", number) {
                Ok(message) if message == due => {
                    next += 1;
                    seen.went_on(1, &mut since);
                }
                Ok(message) if message == "end" => break Ok(next),
                Ok(message) => break Err(wrong(&format!("{message} was pushed, {due} is due"))),
                Err(error) => break Err(error),
            }
        };
        let told = told.join().map_err(|_| wrong("the publisher panicked"))??;
        match outcome? {
            came if came == told => Ok(()),
            came => Err(wrong(&format!("{told} published, {came} came"))),
        }
    })
}

fn expect_push(input: &mut impl BufRead, kind: &str, channel: u64, due: &str) -> io::Result<()> {
    let message = push(input, kind, channel)?;
    if message == due {
        Ok(())
    } else {
        Err(wrong(&format!("{kind} {message:?}, {due:?} is due")))
    }
}

/// The last part of `*3 $.. KIND $.. CHANNEL LAST`.
fn push(input: &mut impl BufRead, kind: &str, channel: u64) -> io::Result<String> {
    let mut line = || {
        let mut line = String::new();
        input.read_line(&mut line)?;
        match line.strip_suffix("\r\n") {
            Some(line) => Ok(line.to_owned()),
            None => Err(wrong("the connection has ended")),
        }
    };
    let channel = channel.to_string();
    for due in ["*3", &format!("${}", kind.len()), kind] {
        let got = line()?;
        if got != due {
            return Err(wrong(&format!("{got:?} where {due:?} is due")));
        }
    }
    for due in [format!("${}", channel.len()), channel] {
        let got = line()?;
        if got != due {
            return Err(wrong(&format!("{got:?} where {due:?} is due")));
        }
    }
    let last = line()?;
    if last.starts_with('$') {
        line()
    } else {
        Ok(last)
    }
}

fn wrong(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}
