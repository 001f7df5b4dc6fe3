//! Sockets, time and signals of the strict clients.
//!
//! One thread, one epoll. Every connection is in one of these states:
//!
//! ```text
//!   Asking ──stop──▶ Finishing ──last reply──▶ Closing ──end of stream──▶ Done
//!      └────────────────┴── reset, end, timeout, out of step ──▶ Broken
//! ```

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::linux::net::TcpStreamExt;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::dialogue::{Dialogue, Excerpt, Finding, Judged};
use super::keys::Store;
use super::{
    FIRST_ERRORS_MAX, Keys, Options, Snapshot, Verdict, Workload, echo, http, memcached, redis,
};
use crate::echo_wire::scramble;

/// Time to finish outstanding requests, and to see the workload close.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// One attempt to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Between attempts while the workload does not listen yet.
const CONNECT_RETRY: Duration = Duration::from_millis(10);
/// A populating or verifying read may wait this long: it must outlast a
/// migration.
const KEYS_TIMEOUT: Duration = Duration::from_secs(60);
/// How often timeouts are looked for.
const TICK: Duration = Duration::from_millis(200);
/// Received bytes of one reply held at most.
const INPUT_BYTES_MAX: usize = 4 * 1024 * 1024;

const TOKEN_TIMER: u64 = u64::MAX;
const TOKEN_SIGNAL: u64 = u64::MAX - 1;
const TOKEN_CONTROL: u64 = u64::MAX - 2;

/// Why a run did not even start.
#[derive(Debug, thiserror::Error)]
pub enum SetUpError {
    /// A connection could not be opened.
    #[error("could not open connection {number} of {of} to {address}")]
    Connect {
        /// Which one, from 1.
        number: usize,
        /// How many were wanted.
        of: usize,
        /// Where to.
        address: std::net::SocketAddr,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The keys could not be written.
    #[error("could not write {keys} keys")]
    Populate {
        /// How many.
        keys: u64,
        /// What stopped it.
        #[source]
        source: io::Error,
    },
    /// The client's own event loop failed.
    #[error("the client's event loop failed")]
    Loop(#[from] io::Error),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Asking,
    Finishing,
    Closing,
    Done,
    Broken,
}

struct Connection {
    stream: TcpStream,
    dialogue: Box<dyn Dialogue>,
    state: State,
    out: VecDeque<u8>,
    input: Vec<u8>,
    /// When each request without a reply was sent, oldest first.
    waiting: VecDeque<Instant>,
    due: Instant,
    requests: u64,
    worst_gap: Duration,
    wants_write: bool,
    asked_last: bool,
}

impl Connection {
    /// Whether replies are still to come.
    fn is_asking(&self) -> bool {
        matches!(self.state, State::Asking | State::Finishing)
    }
}

struct Engine<'a> {
    options: &'a Options,
    epoll: Epoll,
    timer: TimerFd,
    connections: Vec<Connection>,
    due: BinaryHeap<Reverse<(Instant, usize)>>,
    tally: Tally,
    ready: bool,
    stop_at: Option<Instant>,
    /// Set once stopping: the end of patience.
    deadline: Option<Instant>,
    client_lag: Duration,
    /// How long writing the keys took.
    keys_written: Duration,
    keys_verified: u64,
    control: Vec<u8>,
    /// Right replies each connection must reach before a snapshot is printed.
    awaited: Option<Vec<u64>>,
    chunk: Vec<u8>,
}

#[derive(Default)]
struct Tally {
    errors: u64,
    lost: u64,
    doubled: u64,
    first: Vec<String>,
}

impl Tally {
    fn add(&mut self, connection: usize, finding: Finding) {
        self.errors += finding.lost.max(1).max(finding.doubled);
        self.lost += finding.lost;
        self.doubled += finding.doubled;
        if self.first.len() < FIRST_ERRORS_MAX {
            self.first
                .push(format!("connection {connection}: {}", finding.text));
        }
    }
}

/// Runs until told to stop, or until no connection is left, and reports.
///
/// Blocks SIGTERM, SIGINT and SIGUSR1 in the calling thread: they are how it
/// is told. Writes `ready` to standard error once every connection had its
/// first reply, and snapshots to standard output.
///
/// # Errors
///
/// [`SetUpError`] when it could not begin. What goes wrong later is part of
/// the verdict.
pub fn run(options: &Options) -> Result<Verdict, SetUpError> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGUSR1] {
        signals.add(signal);
    }
    signals.thread_block().map_err(io::Error::from)?;
    let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
    let signal_fd = SignalFd::with_flags(&signals, flags).map_err(io::Error::from)?;

    let mut streams = connect(options)?;
    let before = Instant::now();
    if let (Some((keys, store)), Some(first)) = (kept(&options.workload), streams.first_mut())
        && keys.populate
    {
        first.set_read_timeout(Some(KEYS_TIMEOUT))?;
        let populated = store.populate(first, keys);
        populated.map_err(|source| SetUpError::Populate {
            keys: keys.count,
            source,
        })?;
    }
    let keys_written = before.elapsed();
    let mut engine = Engine::new(options, streams)?;
    engine.keys_written = keys_written;
    engine.watch(&signal_fd, TOKEN_SIGNAL)?;
    if options.control {
        engine.watch(&io::stdin(), TOKEN_CONTROL)?;
    }
    engine.turn_until_done(&signal_fd)?;
    Ok(engine.verdict())
}

/// The entries of a data store, and how it is spoken to about them.
fn kept(workload: &Workload) -> Option<(Keys, Store)> {
    match workload {
        Workload::Redis(keys) => Some((*keys, redis::STORE)),
        Workload::Memcached(keys) => Some((*keys, memcached::STORE)),
        Workload::Echo | Workload::Http { .. } => None,
    }
}

/// Opens all connections, one after the other. Only the first is tried again,
/// while the workload does not listen yet: nothing is connected so far.
fn connect(options: &Options) -> Result<Vec<TcpStream>, SetUpError> {
    let patience = Instant::now() + options.connect_wait;
    let mut streams = Vec::with_capacity(options.connections);
    while streams.len() < options.connections {
        match TcpStream::connect_timeout(&options.address, CONNECT_TIMEOUT) {
            Ok(stream) => streams.push(stream),
            Err(error)
                if streams.is_empty()
                    && error.kind() == io::ErrorKind::ConnectionRefused
                    && Instant::now() < patience =>
            {
                thread::sleep(CONNECT_RETRY);
            }
            Err(source) => {
                return Err(SetUpError::Connect {
                    number: streams.len() + 1,
                    of: options.connections,
                    address: options.address,
                    source,
                });
            }
        }
    }
    Ok(streams)
}

/// A number that no other run against the same workload has.
fn run_id() -> u64 {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
    scramble(
        u64::from(std::process::id()),
        u64::from(now.subsec_nanos()) ^ now.as_secs(),
    )
}

impl<'a> Engine<'a> {
    fn new(options: &'a Options, streams: Vec<TcpStream>) -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let mut engine = Self {
            options,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            timer: TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?,
            connections: Vec::with_capacity(streams.len()),
            due: BinaryHeap::with_capacity(streams.len()),
            tally: Tally::default(),
            ready: false,
            stop_at: None,
            deadline: None,
            client_lag: Duration::ZERO,
            keys_written: Duration::ZERO,
            keys_verified: 0,
            control: Vec::new(),
            awaited: None,
            chunk: vec![0; 64 * 1024],
        };
        engine.watch(&engine.timer, TOKEN_TIMER)?;
        let (run, learned, start) = (run_id(), http::Learned::default(), Instant::now());
        let count = u32::try_from(streams.len().max(1)).unwrap_or(u32::MAX);
        let spread = options.interval / count;
        let mut due = start;
        for (index, stream) in streams.into_iter().enumerate() {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            engine.watch(&stream, index as u64)?;
            let dialogue: Box<dyn Dialogue> = match &options.workload {
                Workload::Redis(_) => Box::new(redis::Redis::new(run, index)),
                Workload::Memcached(_) => Box::new(memcached::Memcached::new(run, index)),
                Workload::Echo => Box::new(echo::Echo::new(run, index)),
                Workload::Http { paths } => {
                    let host = options.address.to_string();
                    Box::new(http::Http::new(host, paths, index, learned.clone()))
                }
            };
            engine.due.push(Reverse((due, index)));
            engine.connections.push(Connection {
                stream,
                dialogue,
                state: State::Asking,
                out: VecDeque::new(),
                input: Vec::new(),
                waiting: VecDeque::new(),
                due,
                requests: 0,
                worst_gap: Duration::ZERO,
                wants_write: false,
                asked_last: false,
            });
            due += spread;
        }
        Ok(engine)
    }

    fn watch(&self, fd: &impl AsFd, token: u64) -> io::Result<()> {
        Ok(self
            .epoll
            .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, token))?)
    }

    fn turn_until_done(&mut self, signals: &SignalFd) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); 256];
        let mut tick = Instant::now();
        let mut line = Instant::now();
        while self
            .connections
            .iter()
            .any(|c| !matches!(c.state, State::Done | State::Broken))
        {
            self.arm(tick + TICK)?;
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(nix::errno::Errno::EINTR) => 0,
                other => other?,
            };
            // Sockets first: what has arrived is not the fault of a late timer.
            for token in events[..count].iter().map(EpollEvent::data) {
                match token {
                    TOKEN_TIMER => drop(self.timer.wait()),
                    TOKEN_SIGNAL => self.take_signals(signals)?,
                    TOKEN_CONTROL => self.take_control()?,
                    index => self.socket_event(usize::try_from(index).unwrap_or(usize::MAX))?,
                }
            }
            self.send_due()?;
            self.announce_ready()?;
            self.answer_progress()?;
            let now = Instant::now();
            if now >= tick + TICK {
                tick = now;
                self.look_for_timeouts(now);
            }
            if self.stop_at.is_some_and(|at| now >= at) {
                self.stop()?;
            }
            // The first connection may have waited for the others' last replies.
            if self.deadline.is_some() {
                self.after_replies(0)?;
            }
            if self.options.progress && now >= line + Duration::from_secs(1) {
                line = now;
                eprintln!("{}", serde_json::to_string(&self.snapshot())?);
            }
        }
        Ok(())
    }

    /// Sets the timer to the next request or `tick`, whichever is first.
    fn arm(&self, tick: Instant) -> io::Result<()> {
        let next = self
            .due
            .peek()
            .map_or(tick, |Reverse((due, _))| tick.min(*due));
        let next = self
            .stop_at
            .filter(|_| self.deadline.is_none())
            .map_or(next, |at| next.min(at));
        // Zero would disarm it.
        let wait = next
            .saturating_duration_since(Instant::now())
            .max(Duration::from_nanos(1));
        let expiration = Expiration::OneShot(TimeSpec::from_duration(wait));
        Ok(self.timer.set(expiration, TimerSetTimeFlags::empty())?)
    }

    fn send_due(&mut self) -> io::Result<()> {
        loop {
            let now = Instant::now();
            match self.due.peek() {
                Some(Reverse((due, index))) if *due <= now => {
                    let (late, index) = (now - *due, *index);
                    self.due.pop();
                    if self.connections[index].state == State::Asking {
                        self.client_lag = self.client_lag.max(late);
                        self.ask(index)?;
                    }
                }
                _ => return Ok(()),
            }
        }
    }

    fn ask(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        if matches!(self.options.workload, Workload::Http { .. }) {
            // Servers that write headers and body apart wait in between for
            // our acknowledgement, which would be delayed by 40 ms. The kernel
            // forgets this setting by itself.
            connection.stream.set_quickack(true)?;
        }
        let mut out = Vec::new();
        let count = connection.dialogue.ask(&mut out);
        self.send(index, &out, count)
    }

    fn send(&mut self, index: usize, out: &[u8], count: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        connection.out.extend(out);
        let now = Instant::now();
        connection.waiting.extend(std::iter::repeat_n(now, count));
        self.flush(index)
    }

    fn flush(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        let mut failure = None;
        while !connection.out.is_empty() {
            let (front, _) = connection.out.as_slices();
            match connection.stream.write(front) {
                Ok(count) => drop(connection.out.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        if let Some(error) = failure {
            self.break_off(index, &format!("could not send: {error}"));
            return Ok(());
        }
        let wants_write = !connection.out.is_empty();
        if wants_write != connection.wants_write {
            connection.wants_write = wants_write;
            let mut flags = EpollFlags::EPOLLIN;
            flags.set(EpollFlags::EPOLLOUT, wants_write);
            self.epoll.modify(
                &connection.stream,
                &mut EpollEvent::new(flags, index as u64),
            )?;
        }
        Ok(())
    }

    fn socket_event(&mut self, index: usize) -> io::Result<()> {
        if self.connections[index].wants_write {
            self.flush(index)?;
        }
        let mut ended = None;
        loop {
            let connection = &mut self.connections[index];
            if matches!(connection.state, State::Done | State::Broken) {
                return Ok(());
            }
            match connection.stream.read(&mut self.chunk) {
                Ok(0) => {
                    ended = Some("the workload closed the connection".to_owned());
                    break;
                }
                Ok(count) => {
                    connection.input.extend_from_slice(&self.chunk[..count]);
                    self.judge(index, Instant::now());
                    if count < self.chunk.len() {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    ended = Some(format!("the connection broke: {error}"));
                    break;
                }
            }
        }
        if let Some(why) = ended {
            let connection = &mut self.connections[index];
            if connection.state == State::Closing && connection.input.is_empty() {
                connection.state = State::Done;
                self.forget(index);
            } else {
                self.break_off(index, &why);
            }
            return Ok(());
        }
        self.after_replies(index)
    }

    /// Judges every whole reply received so far.
    fn judge(&mut self, index: usize, now: Instant) {
        let connection = &mut self.connections[index];
        let mut used_in_all = 0;
        while used_in_all < connection.input.len() {
            match connection.dialogue.judge(&connection.input[used_in_all..]) {
                Judged::Incomplete => break,
                Judged::Reply {
                    used,
                    answered,
                    finding,
                } => {
                    used_in_all += used;
                    for _ in 0..answered {
                        if let Some(sent) = connection.waiting.pop_front() {
                            connection.worst_gap = connection.worst_gap.max(now - sent);
                        }
                    }
                    match finding {
                        None => connection.requests += 1,
                        Some(finding) => self.tally.add(index, finding),
                    }
                }
                Judged::OutOfStep(finding) => {
                    self.tally.add(index, finding);
                    connection.state = State::Broken;
                    connection.waiting.clear();
                    connection.input.clear();
                    self.forget(index);
                    return;
                }
            }
        }
        connection.input.drain(..used_in_all);
        if connection.input.len() > INPUT_BYTES_MAX {
            self.break_off(index, "a reply without an end");
        }
    }

    /// Goes on once nothing is outstanding: the next request, or the end.
    fn after_replies(&mut self, index: usize) -> io::Result<()> {
        let connection = &mut self.connections[index];
        if !connection.waiting.is_empty() {
            return Ok(());
        }
        match connection.state {
            State::Asking => {
                // `due` lies ahead when this was a reply to no request.
                let now = Instant::now();
                if connection.due <= now {
                    let mut interval = self.options.interval;
                    if self.options.random_interval {
                        let dice = scramble(index as u64, connection.requests);
                        let percent = u32::try_from(dice % 200).unwrap_or(100);
                        interval = interval * percent / 100;
                    }
                    connection.due = (connection.due + interval).max(now);
                    self.due.push(Reverse((connection.due, index)));
                }
                Ok(())
            }
            State::Finishing if !connection.asked_last => {
                connection.asked_last = true;
                let mut out = Vec::new();
                let count = connection.dialogue.ask_last(&mut out);
                if count == 0 {
                    self.close(index)
                } else {
                    self.send(index, &out, count)
                }
            }
            State::Finishing => self.close(index),
            State::Closing | State::Done | State::Broken => Ok(()),
        }
    }

    /// Everything is answered: says so to the workload and waits for its end
    /// of stream, which no further byte may precede.
    fn close(&mut self, index: usize) -> io::Result<()> {
        if let Some((keys, store)) = kept(&self.options.workload)
            && keys.verify
        {
            // Reading back blocks, so it waits until no other reply is due: it
            // would look late.
            if index == 0 && self.connections[1..].iter().any(Connection::is_asking) {
                return Ok(());
            }
            if index == 0 {
                self.verify_keys(keys, &store)?;
            }
        }
        let connection = &mut self.connections[index];
        connection.state = State::Closing;
        if let Err(error) = connection.stream.shutdown(Shutdown::Write) {
            self.break_off(index, &format!("could not close: {error}"));
        }
        Ok(())
    }

    fn verify_keys(&mut self, keys: Keys, store: &Store) -> io::Result<()> {
        let stream = &mut self.connections[0].stream;
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(KEYS_TIMEOUT))?;
        let tally = &mut self.tally;
        let before = Instant::now();
        let outcome = store.verify(stream, keys, |finding| tally.add(0, finding));
        stream.set_nonblocking(true)?;
        // Reading back is no part of the patience for the other connections.
        self.deadline = self.deadline.map(|deadline| deadline + before.elapsed());
        match outcome {
            Ok(()) => self.keys_verified = keys.count,
            Err(error) => {
                let text = format!("could not read {} keys back: {error}", keys.count);
                self.tally.add(0, Finding::wrong(text));
            }
        }
        Ok(())
    }

    /// Ends a connection that failed; what it still owed is lost.
    fn break_off(&mut self, index: usize, why: &str) {
        let connection = &mut self.connections[index];
        let owed = connection.waiting.len() as u64;
        if let Some(sent) = connection.waiting.front() {
            connection.worst_gap = connection.worst_gap.max(sent.elapsed());
        }
        let rest = match connection.input.as_slice() {
            [] => String::new(),
            rest => format!(", after the beginning of a reply: {}", Excerpt(rest)),
        };
        let text = format!("{why}, {owed} replies owed{rest}");
        self.tally.add(index, Finding::lost(owed, text));
        connection.waiting.clear();
        connection.state = State::Broken;
        self.forget(index);
    }

    /// Closed sockets would report their end for ever.
    fn forget(&self, index: usize) {
        // It is in the set: every connection is added once and leaves it here.
        let _ = self.epoll.delete(&self.connections[index].stream);
    }

    fn look_for_timeouts(&mut self, now: Instant) {
        let timeout = self.options.reply_timeout;
        let over = self.deadline.is_some_and(|deadline| now >= deadline);
        for index in 0..self.connections.len() {
            let connection = &self.connections[index];
            if matches!(connection.state, State::Done | State::Broken) {
                continue;
            }
            if connection
                .waiting
                .front()
                .is_some_and(|sent| now - *sent > timeout)
            {
                self.break_off(index, &format!("no reply within {timeout:?}"));
            } else if over && connection.state == State::Closing {
                self.break_off(index, "the workload did not close after the last request");
            } else if over {
                self.break_off(
                    index,
                    &format!("no reply within {STOP_TIMEOUT:?} of the stop"),
                );
            }
        }
    }

    /// Says `ready`, or gives up when a connection failed before that.
    fn announce_ready(&mut self) -> io::Result<()> {
        if !self.ready && self.connections.iter().any(|c| c.state == State::Broken) {
            return self.stop();
        }
        if !self.ready && self.connections.iter().all(|c| c.requests > 0) {
            self.ready = true;
            self.stop_at = self
                .options
                .duration
                .map(|duration| Instant::now() + duration);
            eprintln!("ready");
        }
        Ok(())
    }

    /// Answers `progress` once every connection went on far enough.
    fn answer_progress(&mut self) -> io::Result<()> {
        let reached = self.awaited.as_ref().is_some_and(|goals| {
            self.connections
                .iter()
                .zip(goals)
                .all(|(connection, goal)| connection.requests >= *goal)
        });
        if reached {
            self.awaited = None;
            self.print_snapshot()?;
        }
        Ok(())
    }

    fn take_signals(&mut self, signals: &SignalFd) -> io::Result<()> {
        while let Some(info) = signals.read_signal()? {
            if i32::try_from(info.ssi_signo).is_ok_and(|number| number == Signal::SIGUSR1 as i32) {
                self.print_snapshot()?;
            } else {
                self.stop()?;
            }
        }
        Ok(())
    }

    fn take_control(&mut self) -> io::Result<()> {
        let mut chunk = [0; 256];
        let count = nix::unistd::read(io::stdin(), &mut chunk)?;
        if count == 0 {
            self.epoll.delete(io::stdin())?;
            return self.stop();
        }
        self.control.extend_from_slice(&chunk[..count]);
        while let Some(end) = self.control.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.control.drain(..=end).collect();
            match line.trim_ascii() {
                b"snapshot" => self.print_snapshot()?,
                b"stop" => self.stop()?,
                [
                    b'p',
                    b'r',
                    b'o',
                    b'g',
                    b'r',
                    b'e',
                    b's',
                    b's',
                    b' ',
                    count @ ..,
                ] => {
                    let count = std::str::from_utf8(count)
                        .ok()
                        .and_then(|text| text.parse().ok());
                    let count: u64 = count.unwrap_or(1);
                    let goals = self
                        .connections
                        .iter()
                        .map(|c| c.requests.saturating_add(count));
                    self.awaited = Some(goals.collect());
                }
                other => eprintln!("strict-client: no such command: {}", Excerpt(other)),
            }
        }
        self.control.truncate(chunk.len());
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        if self.deadline.is_some() {
            return Ok(());
        }
        self.deadline = Some(Instant::now() + STOP_TIMEOUT);
        for index in 0..self.connections.len() {
            if self.connections[index].state == State::Asking {
                self.connections[index].state = State::Finishing;
                self.after_replies(index)?;
            }
        }
        Ok(())
    }

    fn print_snapshot(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, &self.snapshot())?;
        out.write_all(b"\n")?;
        out.flush()
    }

    fn snapshot(&self) -> Snapshot {
        Snapshot {
            requests: self.connections.iter().map(|c| c.requests).sum(),
            requests_min: self
                .connections
                .iter()
                .map(|c| c.requests)
                .min()
                .unwrap_or(0),
            live: self
                .connections
                .iter()
                .filter(|c| c.state == State::Asking)
                .count(),
            errors: self.tally.errors,
            lost: self.tally.lost,
            doubled: self.tally.doubled,
            worst_gap_us: self.worst_gaps().max().unwrap_or(0),
        }
    }

    fn worst_gaps(&self) -> impl Iterator<Item = u64> {
        self.connections.iter().map(|c| micros(c.worst_gap))
    }

    fn verdict(self) -> Verdict {
        Verdict {
            workload: self.options.workload.name().into(),
            connections: self.connections.len(),
            requests: self.connections.iter().map(|c| c.requests).sum(),
            errors: self.tally.errors,
            lost: self.tally.lost,
            doubled: self.tally.doubled,
            worst_gap_us: self.worst_gaps().max().unwrap_or(0),
            worst_gap_us_by_connection: self.worst_gaps().collect(),
            client_lag_us: micros(self.client_lag),
            keys_written_us: micros(self.keys_written),
            keys_verified: self.keys_verified,
            first_errors: self.tally.first,
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
