//! The threads of the lazy server.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use migrate_core::wire::PageOwner;

use super::plan::{Claim, Plan};
use super::sys::{self, Copied, Event};
use super::{LazyError, LazyOptions, LazyReport};
use crate::PAGE;
use crate::store::{Content, PageStore};

/// `LAZY_PAGES_RESTORE_FINISHED` of CRIU's `uffd.c`.
const FINISHED: i32 = 0x5253_5446;

/// Address spaces that are served at once.
const SPACES_MAX: usize = 1 << 16;

/// A fault brings this much along, in bytes.
const AROUND_BYTES: u64 = 64 << 10;

/// How long a copy is put off that met an event the kernel has not reported
/// yet, in milliseconds.
const AGAIN_MS: u64 = 1;

/// One address space.
#[derive(Debug)]
struct Space {
    /// Whose pages it gets; a forked one gets its parent's.
    owner: PageOwner,
    /// Held for reading while pages are put in place, for writing while events
    /// are read: so none is put where an event has just said otherwise. Empty
    /// when nothing is lacking any more.
    uffd: RwLock<Option<OwnedFd>>,
    /// What is claimed is in nobody's plan, but whoever holds `uffd` for
    /// writing finds nothing claimed.
    plan: Mutex<Plan>,
}

#[derive(Debug, Default)]
struct State {
    spaces: Vec<Arc<Space>>,
    /// The tree runs.
    filling: bool,
    over: bool,
    /// Counts what may give the fillers work.
    changes: u64,
    failure: Option<LazyError>,
}

#[derive(Debug)]
struct Shared {
    pages: Arc<PageStore>,
    piece_bytes: u64,
    state: Mutex<State>,
    changed: Condvar,
    bell: Arc<OwnedFd>,
    filled_pages: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is behind these locks is whole at every step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What became of an attempt to put a part in place.
enum Attempt {
    /// Nothing is lacking.
    Idle,
    Filled,
    /// Events have to be read first.
    Again,
    Gone,
}

impl Space {
    fn pid(&self) -> u32 {
        match self.owner {
            PageOwner::Task(pid) => pid,
            PageOwner::Shared(_) => 0,
        }
    }

    fn failed(&self, attempt: &'static str) -> impl FnOnce(io::Error) -> LazyError {
        let pid = self.pid();
        move |source| LazyError::Memory {
            attempt,
            pid,
            source,
        }
    }

    /// Puts the next part in place.
    fn fill(&self, shared: &Shared) -> Result<Attempt, LazyError> {
        let uffd = self.uffd.read().unwrap_or_else(PoisonError::into_inner);
        let Some(uffd) = uffd.as_ref() else {
            return Ok(Attempt::Idle);
        };
        let Some(claim) = lock(&self.plan).claim(shared.piece_bytes) else {
            return Ok(Attempt::Idle);
        };
        self.put(shared, uffd.as_fd(), claim)
    }

    /// Puts a claim in place; gives back what could not be.
    fn put(
        &self,
        shared: &Shared,
        uffd: BorrowedFd<'_>,
        claim: Claim,
    ) -> Result<Attempt, LazyError> {
        let mut done = 0;
        while done < claim.bytes {
            let rest = Claim {
                to: claim.to + done,
                from: claim.from + done,
                bytes: claim.bytes - done,
            };
            let range = rest.from..rest.from + rest.bytes;
            let piece = shared.pages.range(self.owner, range).next();
            // Looked up before the start, and the store does not change.
            let Some(Content::Data(data)) = piece.map(|piece| piece.content) else {
                lock(&self.plan).give_back(rest);
                return Err(LazyError::PageMissing {
                    owner: self.owner,
                    vaddr: rest.from,
                });
            };
            let copied = sys::copy(uffd, rest.to, data);
            let stop = match copied {
                Ok(Copied::All) => data.len() as u64,
                Ok(Copied::Until(stop)) => stop,
                Ok(Copied::Gone) => return Ok(Attempt::Gone),
                Err(error) => {
                    lock(&self.plan).give_back(rest);
                    return Err(self.failed("fill")(error));
                }
            };
            done += stop;
            shared
                .filled_pages
                .fetch_add(stop / PAGE, Ordering::Relaxed);
            if stop < data.len() as u64 {
                lock(&self.plan).give_back(Claim {
                    to: claim.to + done,
                    from: claim.from + done,
                    bytes: claim.bytes - done,
                });
                return Ok(Attempt::Again);
            }
        }
        Ok(Attempt::Filled)
    }
}

impl Shared {
    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        change(&mut state);
        state.changes += 1;
        drop(state);
        self.changed.notify_all();
    }

    fn ring(&self) {
        sys::ring(self.bell.as_fd());
    }

    fn fail(&self, error: LazyError) {
        self.change(|state| {
            state.failure.get_or_insert(error);
            state.over = true;
        });
        self.ring();
    }
}

/// Ends everything when its thread panics: what that had claimed is lost, and
/// nobody would miss it.
struct Alarm<'a>(&'a Shared);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.fail(LazyError::Lost);
        }
    }
}

/// One thread that fills in the background.
fn filler(shared: &Shared, index: usize) {
    let _alarm = Alarm(shared);
    let mut seen = 0;
    let mut again = false;
    loop {
        let spaces = {
            let mut state = lock(&shared.state);
            loop {
                if state.over {
                    return;
                }
                if state.filling && (again || state.changes != seen) {
                    break;
                }
                state = shared
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            seen = state.changes;
            state.spaces.clone()
        };
        again = false;
        // Each starts with another one.
        let start = index % spaces.len().max(1);
        for space in spaces[start..].iter().chain(&spaces[..start]) {
            loop {
                match space.fill(shared) {
                    Ok(Attempt::Filled) => {}
                    Ok(Attempt::Idle) => break,
                    Ok(Attempt::Again) => {
                        again = true;
                        break;
                    }
                    Ok(Attempt::Gone) => {
                        let mut uffd = space.uffd.write().unwrap_or_else(PoisonError::into_inner);
                        lock(&space.plan).take(0..u64::MAX);
                        *uffd = None;
                        break;
                    }
                    Err(error) => {
                        shared.fail(error);
                        return;
                    }
                }
            }
        }
        shared.ring();
        if again {
            // Until the event has been read, which is a change; the kernel may
            // also still be about to report it.
            let state = lock(&shared.state);
            if state.changes == seen && !state.over {
                let _ = shared
                    .changed
                    .wait_timeout(state, Duration::from_millis(AGAIN_MS));
            }
        }
    }
}

/// Starts the threads.
pub(super) fn start(
    listener: UnixListener,
    pages: Arc<PageStore>,
    lacking: Vec<(PageOwner, Range<u64>)>,
    options: LazyOptions,
    bell: Arc<OwnedFd>,
) -> io::Result<mpsc::Receiver<Result<LazyReport, LazyError>>> {
    let shared = Arc::new(Shared {
        pages,
        piece_bytes: options.piece_bytes.clamp(64 << 10, 1 << 20),
        state: Mutex::new(State::default()),
        changed: Condvar::new(),
        bell,
        filled_pages: AtomicU64::new(0),
    });
    for index in 0..options.threads.max(1) {
        let for_thread = Arc::clone(&shared);
        let spawned = thread::Builder::new()
            .name("lazy-fill".to_owned())
            .spawn(move || filler(&for_thread, index));
        if let Err(error) = spawned {
            shared.change(|state| state.over = true);
            return Err(error);
        }
    }
    let mut plans: BTreeMap<PageOwner, Plan> = BTreeMap::new();
    for (owner, range) in lacking {
        let from = range.start;
        plans.entry(owner).or_default().insert(range, from);
    }
    for (owner, range) in options.first {
        if let Some(plan) = plans.get_mut(&owner) {
            plan.hurry(range);
        }
    }
    let (sender, receiver) = mpsc::channel();
    let mut server = Server {
        shared: Arc::clone(&shared),
        plans,
        spaces: Vec::new(),
        finished: None,
        limit: options.limit,
        report: LazyReport::default(),
    };
    let spawned = thread::Builder::new()
        .name("lazy-faults".to_owned())
        .spawn(move || {
            let end = server.run(&listener);
            server.shared.change(|state| state.over = true);
            if end.is_err() && server.finished.is_some() {
                // Closing them would turn what is missing into zeros.
                std::mem::forget(std::mem::take(&mut server.spaces));
            }
            // Nobody may want to know.
            let _ = sender.send(end);
        });
    if let Err(error) = spawned {
        shared.change(|state| state.over = true);
        return Err(error);
    }
    Ok(receiver)
}

/// An address space with the faults that could not be answered yet.
struct Served {
    space: Arc<Space>,
    fd: i32,
    waiting: Vec<u64>,
}

/// The thread that answers faults.
struct Server {
    shared: Arc<Shared>,
    /// Of tasks that CRIU has not handed over yet.
    plans: BTreeMap<PageOwner, Plan>,
    spaces: Vec<Served>,
    /// Since when the tree may run.
    finished: Option<Instant>,
    limit: Duration,
    report: LazyReport,
}

impl Server {
    fn run(&mut self, listener: &UnixListener) -> Result<LazyReport, LazyError> {
        let bell = Arc::clone(&self.shared.bell);
        let failed = |source| LazyError::Start { source };
        // Until CRIU connects, a ring means that nobody wants us any more.
        let stream = loop {
            let ready = sys::poll(&[bell.as_raw_fd(), listener.as_raw_fd()], None);
            let ready = ready.map_err(failed)?;
            if ready[1] {
                match listener.accept() {
                    Ok((stream, _)) => break stream,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(failed(error)),
                }
            } else if ready[0] {
                return Err(LazyError::RestoreEnded);
            }
        };
        let mut greeting = Greeting::default();
        loop {
            let waiting = self.spaces.iter().any(|served| !served.waiting.is_empty());
            let timeout_ms = match self.finished {
                _ if waiting => Some(AGAIN_MS),
                None => None,
                Some(since) => {
                    let left = self.limit.saturating_sub(since.elapsed());
                    Some(u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1))
                }
            };
            let mut fds = vec![
                bell.as_raw_fd(),
                if self.finished.is_none() {
                    stream.as_raw_fd()
                } else {
                    // Left out.
                    -1
                },
            ];
            fds.extend(self.spaces.iter().map(|served| served.fd));
            let ready = sys::poll(&fds, timeout_ms).map_err(failed)?;
            if ready[0] {
                sys::hush(bell.as_fd());
            }
            for index in 0..self.spaces.len() {
                if ready[index + 2] || !self.spaces[index].waiting.is_empty() {
                    self.serve(index)?;
                }
            }
            if ready[1] {
                self.greet(&stream, &mut greeting)?;
            }
            if let Some(error) = lock(&self.shared.state).failure.take() {
                return Err(error);
            }
            if let Some(since) = self.finished {
                self.let_go();
                if self.spaces.is_empty() {
                    self.report.filled_pages = self.shared.filled_pages.load(Ordering::Relaxed);
                    self.report.took_us =
                        u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
                    return Ok(self.report);
                }
                if since.elapsed() >= self.limit {
                    return Err(LazyError::Slow {
                        missing_bytes: self
                            .spaces
                            .iter()
                            .map(|served| lock(&served.space.plan).bytes())
                            .sum(),
                        limit: self.limit,
                    });
                }
            }
        }
    }

    /// Hears what CRIU has to say.
    fn greet(&mut self, stream: &UnixStream, greeting: &mut Greeting) -> Result<(), LazyError> {
        while let Some(said) = greeting.next(stream)? {
            match said {
                Said::Task(pid, uffd) => {
                    self.report.tasks += 1;
                    let owner = PageOwner::Task(pid);
                    let plan = self.plans.remove(&owner).unwrap_or_default();
                    self.add(owner, uffd, plan)?;
                }
                Said::Finished => {
                    if self.plans.values().any(|plan| !plan.is_empty()) {
                        // Its memory would be zeros.
                        return Err(LazyError::Protocol {
                            what: "a task with memory was not handed over",
                        });
                    }
                    self.finished = Some(Instant::now());
                    self.shared.change(|state| state.filling = true);
                    return Ok(());
                }
                Said::Ended => return Err(LazyError::RestoreEnded),
            }
        }
        Ok(())
    }

    fn add(&mut self, owner: PageOwner, uffd: OwnedFd, plan: Plan) -> Result<(), LazyError> {
        if self.spaces.len() >= SPACES_MAX {
            std::mem::forget(uffd);
            return Err(LazyError::Protocol {
                what: "too many address spaces",
            });
        }
        let fd = uffd.as_raw_fd();
        let space = Arc::new(Space {
            owner,
            uffd: RwLock::new(Some(uffd)),
            plan: Mutex::new(plan),
        });
        self.spaces.push(Served {
            space: Arc::clone(&space),
            fd,
            waiting: Vec::new(),
        });
        self.shared.change(|state| state.spaces.push(space));
        Ok(())
    }

    /// Closes what is complete.
    fn let_go(&mut self) {
        let mut left = Vec::new();
        for served in std::mem::take(&mut self.spaces) {
            let ended = {
                let mut uffd = served
                    .space
                    .uffd
                    .write()
                    .unwrap_or_else(PoisonError::into_inner);
                if uffd.is_none() {
                    self.report.ended += 1;
                    true
                } else if lock(&served.space.plan).is_empty() {
                    // Whoever waits looks again and finds its page, or zeros
                    // where nothing was to come.
                    *uffd = None;
                    true
                } else {
                    false
                }
            };
            if ended {
                self.shared.change(|state| {
                    state
                        .spaces
                        .retain(|space| !Arc::ptr_eq(space, &served.space))
                });
            } else {
                left.push(served);
            }
        }
        self.spaces = left;
    }

    /// Reads the events of one address space and answers its faults.
    fn serve(&mut self, index: usize) -> Result<(), LazyError> {
        let served = &mut self.spaces[index];
        let space = Arc::clone(&served.space);
        let mut guard = space.uffd.write().unwrap_or_else(PoisonError::into_inner);
        let Some(uffd) = guard.as_ref() else {
            served.waiting.clear();
            return Ok(());
        };
        let mut forks = Vec::new();
        let mut noted = false;
        let events = sys::events(uffd.as_fd()).map_err(space.failed("watch"))?;
        {
            let mut plan = lock(&space.plan);
            for event in events {
                noted |= !matches!(event, Event::Fault(_));
                match event {
                    Event::Fault(address) => served.waiting.push(address),
                    // What it lacks at this very moment, for events come in
                    // order.
                    Event::Fork(uffd) => forks.push((uffd, plan.clone())),
                    Event::Remap { from, to, bytes } => plan.shift(from, to, bytes),
                    Event::Remove { start, end } => {
                        plan.take(start..end);
                    }
                }
            }
        }
        // Before anything can fail: whoever holds them must not close them.
        for (uffd, plan) in forks {
            self.report.forks += 1;
            self.add(space.owner, uffd, plan)?;
        }
        if noted {
            self.shared.change(|_| {});
        }
        let served = &mut self.spaces[index];
        // Before the tree runs, a neighbour may not be watched yet.
        let around = if self.finished.is_some() {
            AROUND_BYTES
        } else {
            PAGE
        };
        let mut gone = false;
        let mut later = Vec::new();
        for address in std::mem::take(&mut served.waiting) {
            let claim = {
                let mut plan = lock(&space.plan);
                let claim = plan.at(address, around);
                if let Some(claim) = claim {
                    plan.take(claim.to..claim.to + claim.bytes);
                }
                claim
            };
            let attempt = match claim {
                Some(claim) => space.put(&self.shared, uffd.as_fd(), claim)?,
                None => match sys::zero(uffd.as_fd(), address).map_err(space.failed("fill"))? {
                    Copied::All => Attempt::Filled,
                    Copied::Until(_) => Attempt::Again,
                    Copied::Gone => Attempt::Gone,
                },
            };
            match attempt {
                Attempt::Filled | Attempt::Idle => {
                    self.report.faults += 1;
                    // Where somebody else was first, nobody has been woken.
                    sys::wake(uffd.as_fd(), address);
                }
                Attempt::Again => later.push(address),
                Attempt::Gone => gone = true,
            }
        }
        served.waiting = later;
        if gone {
            *guard = None;
            served.fd = -1;
            served.waiting.clear();
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if thread::panicking() {
            // Closing them would turn what is missing into zeros.
            std::mem::forget(std::mem::take(&mut self.spaces));
        }
    }
}

/// What CRIU says over the socket.
enum Said {
    Task(u32, OwnedFd),
    Finished,
    Ended,
}

/// The part of it that has come.
#[derive(Default)]
struct Greeting {
    word: [u8; 4],
    have: usize,
    /// The task whose descriptor comes next.
    pid: Option<u32>,
}

impl Greeting {
    fn next(&mut self, stream: &UnixStream) -> Result<Option<Said>, LazyError> {
        let failed = |source| LazyError::Start { source };
        loop {
            if let Some(pid) = self.pid {
                let Some((length, fd)) = sys::receive(stream.as_fd(), &mut [0]).map_err(failed)?
                else {
                    return Ok(None);
                };
                self.pid = None;
                return match fd {
                    Some(fd) => Ok(Some(Said::Task(pid, fd))),
                    None if length == 0 => Ok(Some(Said::Ended)),
                    None => Err(LazyError::Protocol {
                        what: "a task without a userfaultfd",
                    }),
                };
            }
            let have = self.have;
            let Some((length, _)) =
                sys::receive(stream.as_fd(), &mut self.word[have..]).map_err(failed)?
            else {
                return Ok(None);
            };
            if length == 0 {
                return Ok(Some(Said::Ended));
            }
            self.have += length;
            if self.have < 4 {
                continue;
            }
            self.have = 0;
            match i32::from_ne_bytes(self.word) {
                FINISHED => return Ok(Some(Said::Finished)),
                // Dead and not reaped: it has no memory.
                ..=-1 => {}
                0 => {
                    return Err(LazyError::Protocol { what: "process 0" });
                }
                pid => self.pid = u32::try_from(pid).ok(),
            }
        }
    }
}
