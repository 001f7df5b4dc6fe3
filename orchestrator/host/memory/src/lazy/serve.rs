//! The threads of the lazy server.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use migrate_core::wire::PageOwner;
use rustix::process::{getpriority_process, setpriority_process};

use super::late::{LATE_FROM, LatePages, Noted};
use super::partner::{self, Death, Heard, Partner, Said, Slate};
use super::plan::{Claim, Plan};
use super::sys::{self, Copied, EVENTS_BYTES, Event};
use super::{LATE_LIMIT, LazyError, LazyReport, Told};
use crate::PAGE;
use crate::arena::Mapping;
use crate::mask::SomePages;

/// `LAZY_PAGES_RESTORE_FINISHED` of CRIU's `uffd.c`.
const FINISHED: i32 = 0x5253_5446;

/// Address spaces that are served at once.
const SPACES_MAX: usize = 1 << 16;

/// A fault brings this much along, in bytes.
const AROUND_BYTES: u64 = 64 << 10;

/// How long a copy is put off that met an event the kernel has not reported
/// yet, in milliseconds.
const AGAIN_MS: u64 = 1;

/// So long a fault may wait for an event that does not come: events come within
/// microseconds, but for one case. When `mremap` moves locked memory to make it
/// larger, Linux provides the new part before it reports the move, and takes no
/// page for it until it has: each waits for the other (`do_mremap` in
/// `mm/mremap.c`, seen with 6.18).
///
/// Long, because a thread that has moved memory and is kept from the CPU before
/// it reports that looks the same, and another one that touches the new place
/// meanwhile must not find zeros there.
const STUCK_AFTER: Duration = Duration::from_secs(1);

/// Longer than the agent waits for pages of the source ([`LATE_LIMIT`]), which
/// then says so; this is for an agent that says nothing.
const LATE_PATIENCE: Duration = LATE_LIMIT.saturating_mul(2);

/// One address space.
#[derive(Debug)]
struct Space {
    /// Whose pages it gets; a forked one gets its parent's.
    owner: PageOwner,
    /// Its name between the two processes.
    id: u64,
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
    pages: Arc<Mapping>,
    late: Arc<LatePages>,
    piece_bytes: u64,
    state: Mutex<State>,
    changed: Condvar,
    bell: Arc<OwnedFd>,
    filled_pages: AtomicU64,
    found_pages: AtomicU64,
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

    /// Nothing is lacking, or nobody lacks it.
    fn needs_nothing(&self) -> bool {
        // For writing: nothing is claimed meanwhile.
        let uffd = self.uffd.write().unwrap_or_else(PoisonError::into_inner);
        uffd.is_none() || lock(&self.plan).is_empty()
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
            // Looked up before the start, and the pages do not change.
            let Some(data) = shared.content(&rest) else {
                lock(&self.plan).give_back(rest);
                return Err(LazyError::PageMissing {
                    owner: self.owner,
                    vaddr: rest.to,
                });
            };
            let copied = sys::copy(uffd, rest.to, data, &shared.found_pages);
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
    /// What a claim is to be filled with.
    fn content(&self, claim: &Claim) -> Option<&[u8]> {
        if let Some(late) = claim.from.checked_sub(LATE_FROM) {
            return self
                .late
                .content(late / PAGE..(late + claim.bytes).div_ceil(PAGE));
        }
        let from = usize::try_from(claim.from).ok()?;
        let bytes = usize::try_from(claim.bytes).ok()?;
        self.pages.bytes().get(from..from + bytes)
    }

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

/// Of threads that fill: a tenth of what a thread of the tree gets of a CPU that both want
/// (`sched_prio_to_weight` of `kernel/sched/core.c`).
const FILL_NICE: i32 = 10;

/// One thread that fills in the background.
fn filler(shared: &Shared, index: usize) {
    let _alarm = Alarm(shared);
    // The tree, and what it waits for, go first. Nobody has to let it.
    let now = getpriority_process(None).unwrap_or(0);
    let _ = setpriority_process(None, now.max(FILL_NICE));
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

/// What is served, and to whom it is told.
pub(super) struct Task {
    pub(super) pages: Arc<Mapping>,
    /// Pages that are not on this host yet.
    pub(super) late: Arc<LatePages>,
    /// Where they belong: their owner and addresses, by number.
    pub(super) late_places: Vec<(PageOwner, Range<u64>, u64)>,
    /// What tasks lack that CRIU has not handed over yet.
    pub(super) plans: BTreeMap<PageOwner, Plan>,
    pub(super) threads: usize,
    pub(super) piece_bytes: u64,
    pub(super) limit: Duration,
    pub(super) bell: Arc<OwnedFd>,
    /// The other process, when there is one.
    pub(super) partner: Option<Partner>,
    /// Whoever waits in this one.
    pub(super) teller: Option<mpsc::Sender<Told>>,
}

/// A copy of what an address space lacks, with its descriptor.
pub(super) struct Replica {
    pub(super) owner: PageOwner,
    pub(super) uffd: OwnedFd,
    pub(super) plan: Plan,
}

/// Orders ranges by what was written most recently.
pub(super) fn plans(
    lacking: impl IntoIterator<Item = (PageOwner, Range<u64>, u64)>,
    first: impl IntoIterator<Item = (PageOwner, Range<u64>)>,
    then: impl IntoIterator<Item = SomePages>,
) -> BTreeMap<PageOwner, Plan> {
    let mut parts: BTreeMap<PageOwner, Vec<(Range<u64>, u64)>> = BTreeMap::new();
    for (owner, range, from) in lacking {
        parts.entry(owner).or_default().push((range, from));
    }
    let mut plans: BTreeMap<PageOwner, Plan> = parts
        .into_iter()
        .map(|(owner, lacking)| (owner, Plan::of(lacking)))
        .collect();
    for (owner, range) in first {
        if let Some(plan) = plans.get_mut(&owner) {
            plan.hurry(range);
        }
    }
    for some in then {
        if let Some(plan) = plans.get_mut(&some.owner) {
            plan.hurry_then(some);
        }
    }
    plans
}

/// An address space with the faults that could not be answered yet.
struct Served {
    space: Arc<Space>,
    fd: i32,
    waiting: Vec<u64>,
    /// Those that wait for pages that are not on this host.
    waiting_late: Vec<u64>,
    /// Since when they wait without an event.
    waiting_since: Option<Instant>,
    /// What became of the partner's duplicate.
    duplicate: Duplicate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Duplicate {
    Open,
    /// He was asked to close it.
    Closing,
    Closed,
}

/// The thread that answers faults.
pub(super) struct Server {
    shared: Arc<Shared>,
    /// Of tasks that CRIU has not handed over yet.
    plans: BTreeMap<PageOwner, Plan>,
    spaces: Vec<Served>,
    next_id: u64,
    /// Since when the tree may run.
    finished: Option<Instant>,
    handed_over: bool,
    limit: Duration,
    report: LazyReport,
    partner: Option<Partner>,
    /// Events that he was told of.
    told: u64,
    /// The agent, who would bring what is not on this host, has ended.
    orphaned: bool,
    teller: Option<mpsc::Sender<Told>>,
    late_places: Vec<(PageOwner, Range<u64>, u64)>,
    noted: Noted,
    /// When the last of them came.
    last_late: Instant,
    all_late: bool,
}

impl Server {
    /// Starts the threads that fill.
    pub(super) fn new(task: Task) -> io::Result<Self> {
        let noted = Noted::new(&task.late);
        let shared = Arc::new(Shared {
            pages: task.pages,
            late: task.late,
            piece_bytes: task.piece_bytes.clamp(64 << 10, 1 << 20),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            bell: task.bell,
            filled_pages: AtomicU64::new(0),
            found_pages: AtomicU64::new(0),
        });
        for index in 0..task.threads.max(1) {
            let for_thread = Arc::clone(&shared);
            let spawned = thread::Builder::new()
                .name("lazy-fill".to_owned())
                .spawn(move || filler(&for_thread, index));
            if let Err(error) = spawned {
                shared.change(|state| state.over = true);
                return Err(error);
            }
        }
        Ok(Self {
            shared,
            plans: task.plans,
            spaces: Vec::new(),
            next_id: 0,
            finished: None,
            handed_over: false,
            limit: task.limit,
            report: LazyReport::default(),
            partner: task.partner,
            told: 0,
            orphaned: false,
            teller: task.teller,
            late_places: task.late_places,
            noted,
            last_late: Instant::now(),
            all_late: false,
        })
    }

    /// Serves CRIU and the tree to the end.
    pub(super) fn serve(mut self, listener: &UnixListener) -> Result<LazyReport, LazyError> {
        let end = self.run(listener);
        self.end(end)
    }

    /// Goes on for a server that has ended: while the tree ran, or after CRIU had
    /// handed over every task, whose connection then says when the tree runs.
    /// What is returned beside the end must stay open until the copy is dead.
    pub(super) fn take_over(
        mut self,
        replicas: Vec<Replica>,
        criu: Option<&UnixStream>,
    ) -> (Result<LazyReport, LazyError>, Vec<OwnedFd>) {
        let end = self.go_on(replicas, criu);
        let end = self.end(end);
        let left = std::mem::take(&mut self.spaces).into_iter();
        let held = left.filter_map(|served| {
            let mut uffd = served
                .space
                .uffd
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            uffd.take()
        });
        (end, held.collect())
    }

    fn go_on(
        &mut self,
        replicas: Vec<Replica>,
        criu: Option<&UnixStream>,
    ) -> Result<LazyReport, LazyError> {
        let runs = criu.is_none();
        self.handed_over = true;
        self.finished = runs.then(Instant::now);
        for replica in replicas {
            let uffd = replica.uffd.as_raw_fd();
            self.next_id += 1;
            let id = self.next_id;
            self.add(id, replica.owner, replica.uffd, replica.plan)?;
            // What the other one has read and not answered comes again.
            // SAFETY: held by the space that was just added.
            sys::wake_all(unsafe { BorrowedFd::borrow_raw(uffd) });
        }
        self.late_arrived();
        self.shared.change(|state| state.filling = runs);
        self.fill_up(criu)
    }

    fn end(&mut self, end: Result<LazyReport, LazyError>) -> Result<LazyReport, LazyError> {
        self.shared.change(|state| state.over = true);
        if end.is_err() && self.finished.is_some() {
            // Closing them would turn what is missing into zeros.
            std::mem::forget(std::mem::take(&mut self.spaces));
        }
        match &end {
            Ok(report) => self.say(&Said::End(*report), &[]),
            Err(error) => self.say(&Said::Failed(error.to_string()), &[]),
        }
        end
    }

    fn run(&mut self, listener: &UnixListener) -> Result<LazyReport, LazyError> {
        let bell = Arc::clone(&self.shared.bell);
        let failed = |source| LazyError::Start { source };
        // Until CRIU connects, a ring means that nobody wants us any more, and
        // so does the partner's end.
        let stream = loop {
            let partner = self.partner.as_ref().map_or(-1, |p| p.socket.as_raw_fd());
            let fds = [bell.as_raw_fd(), listener.as_raw_fd(), partner];
            let ready = sys::poll(&fds, None).map_err(failed)?;
            if ready[1] {
                match listener.accept() {
                    Ok((stream, _)) => break stream,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(failed(error)),
                }
            } else if ready[0] {
                return Err(LazyError::RestoreEnded);
            } else if ready[2] {
                self.hear();
                if self.partner.is_none() {
                    return Err(LazyError::RestoreEnded);
                }
            }
        };
        self.say(&Said::Criu, &[stream.as_fd()]);
        self.fill_up(Some(&stream))
    }

    /// Serves until nothing is lacking; hears CRIU until it says that the tree
    /// may run.
    fn fill_up(&mut self, stream: Option<&UnixStream>) -> Result<LazyReport, LazyError> {
        let bell = Arc::clone(&self.shared.bell);
        let failed = |source| LazyError::Start { source };
        let mut greeting = Greeting::default();
        loop {
            let waiting = self.spaces.iter().any(|served| !served.waiting.is_empty());
            let timeout_ms = match self.finished {
                _ if waiting => Some(AGAIN_MS),
                None => None,
                Some(since) => {
                    let (since, limit) = self.until(since);
                    let left = limit.saturating_sub(since.elapsed());
                    Some(u64::try_from(left.as_millis()).unwrap_or(u64::MAX).max(1))
                }
            };
            let stream = stream.filter(|_| self.finished.is_none());
            // What is -1 is left out.
            let mut fds = vec![
                bell.as_raw_fd(),
                stream.map_or(-1, |stream| stream.as_raw_fd()),
                self.partner.as_ref().map_or(-1, |p| p.socket.as_raw_fd()),
                self.shared.late.arrived_bell().as_raw_fd(),
            ];
            let own = fds.len();
            fds.extend(self.spaces.iter().map(|served| served.fd));
            let ready = sys::poll(&fds, timeout_ms).map_err(failed)?;
            if ready[0] {
                sys::hush(bell.as_fd());
            }
            if ready[3] {
                self.shared.late.hush_arrived();
                self.late_arrived();
            }
            for index in 0..fds.len() - own {
                if ready[index + own] || !self.spaces[index].waiting.is_empty() {
                    self.answer(index)?;
                }
            }
            if ready[1]
                && let Some(stream) = stream
            {
                self.greet(stream, &mut greeting)?;
            }
            if ready[2] {
                self.hear();
            }
            if let Some(error) = lock(&self.shared.state).failure.take() {
                return Err(error);
            }
            self.late_is_coming()?;
            if let Some(since) = self.finished {
                self.let_go();
                if self.spaces.is_empty() {
                    self.report.filled_pages = self.shared.filled_pages.load(Ordering::Relaxed);
                    self.report.found_pages = self.shared.found_pages.load(Ordering::Relaxed);
                    self.report.took_us =
                        u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX);
                    return Ok(self.report);
                }
                let missing_bytes: u64 = self
                    .spaces
                    .iter()
                    .map(|served| lock(&served.space.plan).bytes())
                    .sum();
                let (since, limit) = self.until(since);
                if since.elapsed() >= limit && missing_bytes > 0 {
                    return Err(LazyError::Slow {
                        missing_bytes,
                        limit: self.limit,
                    });
                }
            }
        }
    }

    /// Since when, and for how long, the end may be waited for.
    fn until(&self, finished: Instant) -> (Instant, Duration) {
        if self.shared.late.missing() > 0 {
            (self.last_late.max(finished), LATE_PATIENCE)
        } else {
            (self.last_late.max(finished), self.limit)
        }
    }

    /// Notes what has come to this host.
    fn late_arrived(&mut self) {
        if self.all_late || self.shared.late.pages() == 0 {
            return;
        }
        // Before the look: what comes after it rings again.
        let all = self.shared.late.missing() == 0;
        let fresh = self.noted.fresh(&self.shared.late);
        if fresh.is_empty() && !all {
            return;
        }
        self.last_late = Instant::now();
        for numbers in &fresh {
            let from = LATE_FROM + numbers.start * PAGE..LATE_FROM + numbers.end * PAGE;
            let start = self.late_places.partition_point(|(_, place, first)| {
                first + (place.end - place.start) <= from.start
            });
            for (owner, place, first) in &self.late_places[start..] {
                if *first >= from.end {
                    break;
                }
                let (low, high) = (
                    from.start.max(*first),
                    from.end.min(first + (place.end - place.start)),
                );
                let place = place.start + (low - first)..place.start + (high - first);
                for served in self.spaces.iter().filter(|one| one.space.owner == *owner) {
                    lock(&served.space.plan).arrive(place.clone(), low..high);
                }
                if let Some(plan) = self.plans.get_mut(owner) {
                    plan.arrive(place, low..high);
                }
            }
        }
        if all {
            self.all_late = true;
            for served in &self.spaces {
                lock(&served.space.plan).arrive_all();
            }
            for plan in self.plans.values_mut() {
                plan.arrive_all();
            }
        }
        for served in &mut self.spaces {
            served.waiting.append(&mut served.waiting_late);
        }
        self.shared.change(|_| {});
    }

    /// What is not on this host must be on its way.
    fn late_is_coming(&self) -> Result<(), LazyError> {
        let missing = self.shared.late.missing();
        if missing == 0 {
            return Ok(());
        }
        let overdue = self
            .finished
            .is_some_and(|finished| self.last_late.max(finished).elapsed() >= LATE_PATIENCE);
        if self.shared.late.is_lost() || self.orphaned || overdue {
            return Err(LazyError::NeverCame { missing });
        }
        Ok(())
    }

    /// Tells the partner; one who cannot be told any more is none.
    fn say(&mut self, said: &Said, fds: &[BorrowedFd<'_>]) {
        if let Some(partner) = &self.partner
            && let Err(error) = partner::say(partner.socket.as_fd(), said, fds)
        {
            self.orphaned |= error.kind() != io::ErrorKind::WouldBlock;
            self.alone();
        }
    }

    fn alone(&mut self) {
        if let Some(partner) = self.partner.take() {
            // Before he can hear that the connection has ended, which closing it does
            // not do as long as another process has the descriptor.
            partner.slate.set(Slate::ALONE, true);
            sys::hang_up(partner.socket.as_fd());
        }
    }

    /// Hears the partner.
    fn hear(&mut self) {
        while let Some(partner) = &self.partner {
            match partner::hear(partner.socket.as_fd(), false) {
                Ok(Heard::Said(Said::Complete { id }, _)) => {
                    for served in &mut self.spaces {
                        if served.space.id == id {
                            served.duplicate = Duplicate::Closed;
                        }
                    }
                }
                Ok(Heard::Said(..)) => {}
                Ok(Heard::Nothing) => return,
                Ok(Heard::Gone) | Err(_) => {
                    self.orphaned = true;
                    self.alone();
                }
            }
        }
    }

    /// Hears what CRIU has to say.
    fn greet(&mut self, stream: &UnixStream, greeting: &mut Greeting) -> Result<(), LazyError> {
        loop {
            let is_last = match greeting.ahead(stream)? {
                Ahead::Nothing => return Ok(()),
                Ahead::Last => {
                    if self.plans.values().any(|plan| !plan.is_empty()) {
                        // Its memory would be zeros.
                        return Err(LazyError::Protocol {
                            what: "a task with memory was not handed over",
                        });
                    }
                    // Before it is taken: whoever goes on for this process either
                    // knows of it or finds it.
                    self.say(&Said::Runs, &[]);
                    if let Some(partner) = &self.partner {
                        partner.may_die(|death| death == Death::AtLastWord);
                    }
                    true
                }
                Ahead::More => {
                    // Until he has been told of it, only this process knows.
                    self.heard_of(false);
                    false
                }
            };
            match greeting.next(stream)? {
                None => {
                    self.heard_of(!greeting.is_half());
                    return Ok(());
                }
                Some(FromCriu::Task(pid, uffd)) => {
                    self.report.tasks += 1;
                    let owner = PageOwner::Task(pid);
                    let plan = self.plans.remove(&owner).unwrap_or_default();
                    self.next_id += 1;
                    let id = self.next_id;
                    self.say(&Said::Task { id, pid }, &[uffd.as_fd()]);
                    self.add(id, owner, uffd, plan)?;
                }
                Some(FromCriu::Zombie) => {}
                Some(FromCriu::Finished) if is_last => {
                    self.finished = Some(Instant::now());
                    let fills = self.partner.as_ref().is_none_or(Partner::fills);
                    self.shared.change(|state| state.filling = fills);
                    return Ok(());
                }
                Some(FromCriu::Finished) => {
                    return Err(LazyError::Protocol {
                        what: "a word in pieces",
                    });
                }
                Some(FromCriu::Ended) => return Err(LazyError::RestoreEnded),
            }
            if !self.handed_over && self.plans.values().all(Plan::is_empty) {
                self.handed_over = true;
                self.say(&Said::HandedOver, &[]);
                if let Some(teller) = &self.teller {
                    // Nobody may want to know.
                    let _ = teller.send(Told::HandedOver);
                }
            }
            self.heard_of(true);
        }
    }

    /// Notes for the partner whether he was told of all that CRIU has said.
    fn heard_of(&self, all: bool) {
        if let Some(partner) = &self.partner {
            partner.slate.set(Slate::HEARING, !all);
        }
    }

    fn add(
        &mut self,
        id: u64,
        owner: PageOwner,
        uffd: OwnedFd,
        plan: Plan,
    ) -> Result<(), LazyError> {
        if self.spaces.len() >= SPACES_MAX {
            std::mem::forget(uffd);
            return Err(LazyError::Protocol {
                what: "too many address spaces",
            });
        }
        let fd = uffd.as_raw_fd();
        let space = Arc::new(Space {
            owner,
            id,
            uffd: RwLock::new(Some(uffd)),
            plan: Mutex::new(plan),
        });
        self.spaces.push(Served {
            space: Arc::clone(&space),
            fd,
            waiting: Vec::new(),
            waiting_late: Vec::new(),
            waiting_since: None,
            duplicate: Duplicate::Open,
        });
        self.shared.change(|state| state.spaces.push(space));
        Ok(())
    }

    /// Closes what is complete.
    fn let_go(&mut self) {
        let mut left = Vec::new();
        for mut served in std::mem::take(&mut self.spaces) {
            let id = served.space.id;
            if self.partner.is_none() {
                served.duplicate = Duplicate::Closed;
            } else if served.duplicate == Duplicate::Open && served.space.needs_nothing() {
                // As long as he has it open, somebody must answer.
                served.duplicate = Duplicate::Closing;
                self.say(&Said::Complete { id }, &[]);
            }
            let ended = served.duplicate == Duplicate::Closed && {
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
    fn answer(&mut self, index: usize) -> Result<(), LazyError> {
        let served = &mut self.spaces[index];
        let space = Arc::clone(&served.space);
        let mut guard = space.uffd.write().unwrap_or_else(PoisonError::into_inner);
        let Some(uffd) = guard.as_ref() else {
            served.waiting.clear();
            served.waiting_late.clear();
            return Ok(());
        };
        let mut forks = Vec::new();
        let mut noted = Vec::new();
        let events = match &self.partner {
            Some(partner) => {
                let place = (self.told, space.id, self.next_id);
                partner.slate.read(uffd.as_fd(), place)
            }
            None => {
                let mut buffer = [0; EVENTS_BYTES];
                sys::read_events(uffd.as_fd(), &mut buffer).map(|_| sys::events(&buffer))
            }
        };
        let events = events.map_err(space.failed("watch"))?;
        {
            let mut plan = lock(&space.plan);
            for event in events {
                noted.extend(Said::of(&event, space.id, &mut self.next_id));
                match event {
                    Event::Fault(address) => served.waiting.push(address),
                    // What it lacks at this very moment, for events come in
                    // order.
                    Event::Fork(fd) => {
                        // SAFETY: the kernel has made this descriptor for this
                        // process, which has just read of it.
                        let uffd = unsafe { OwnedFd::from_raw_fd(fd) };
                        forks.push((self.next_id, uffd, plan.clone()));
                    }
                    Event::Remap { from, to, bytes } => plan.shift(from, to, bytes),
                    Event::Remove { start, end } => {
                        plan.take(start..end);
                    }
                }
            }
        }
        self.told += noted.len() as u64;
        if let Some(partner) = &self.partner {
            partner.may_die(|death| matches!(death, Death::AtEvent(last) if self.told >= last));
        }
        for said in &noted {
            let fd = match said {
                Said::Fork { id, .. } => forks.iter().find(|(child, ..)| child == id),
                _ => None,
            };
            match fd {
                Some((_, uffd, _)) => self.say(said, &[uffd.as_fd()]),
                None => self.say(said, &[]),
            }
        }
        if let Some(partner) = &self.partner {
            partner.slate.set(Slate::READING, false);
        }
        // Before anything can fail: whoever holds them must not close them.
        for (id, uffd, plan) in forks {
            self.report.forks += 1;
            self.add(id, space.owner, uffd, plan)?;
        }
        let served = &mut self.spaces[index];
        if !noted.is_empty() {
            self.shared.change(|_| {});
            served.waiting_since = None;
            // What they wait for may be elsewhere by now.
            served.waiting.append(&mut served.waiting_late);
        }
        let stuck = served
            .waiting_since
            .is_some_and(|since| since.elapsed() >= STUCK_AFTER);
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
                let mut claim = plan.at(address, around);
                if claim.is_none()
                    && let Some(late) = plan.late_at(address, around)
                {
                    let first = (late.from - LATE_FROM) / PAGE;
                    if !self.shared.late.has(first) {
                        if !served.waiting_late.contains(&address) {
                            self.shared.late.note_fault();
                            served.waiting_late.push(address);
                        }
                        self.shared.late.want(first..first + late.bytes / PAGE);
                        continue;
                    }
                    // It has moved, or come just now.
                    claim = Some(Claim {
                        bytes: PAGE,
                        ..late
                    });
                }
                if let Some(claim) = claim {
                    plan.take(claim.to..claim.to + claim.bytes);
                }
                claim
            };
            let attempt = match claim {
                Some(claim) => space.put(&self.shared, uffd.as_fd(), claim)?,
                None => match sys::zero(uffd.as_fd(), address).map_err(space.failed("fill"))? {
                    Copied::All => Attempt::Filled,
                    Copied::Until(_) if stuck => {
                        // Nothing is to come there, so that nobody need watch.
                        sys::let_be(uffd.as_fd(), address).map_err(space.failed("leave"))?;
                        Attempt::Filled
                    }
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
        if !later.is_empty() {
            served.waiting_since.get_or_insert_with(Instant::now);
        } else if !stuck {
            // The next page of the same system call would wait as long.
            served.waiting_since = None;
        }
        served.waiting = later;
        if gone {
            *guard = None;
            served.fd = -1;
            served.waiting.clear();
            served.waiting_late.clear();
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Nobody fills for a server that is gone.
        self.shared.change(|state| state.over = true);
        if thread::panicking() {
            // Closing them would turn what is missing into zeros.
            std::mem::forget(std::mem::take(&mut self.spaces));
        }
    }
}

/// What CRIU says over the socket.
enum FromCriu {
    Task(u32, OwnedFd),
    /// Dead and not reaped: it has no memory.
    Zombie,
    Finished,
    Ended,
}

/// What it is about to say.
enum Ahead {
    /// Nothing yet.
    Nothing,
    /// [`FromCriu::Finished`], in one piece as it was sent.
    Last,
    /// Something else, the end of the connection included.
    More,
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
    /// Something was taken from the connection whose rest is still to come.
    fn is_half(&self) -> bool {
        self.have > 0 || self.pid.is_some()
    }

    /// Looks at what comes next, and takes nothing.
    fn ahead(&self, stream: &UnixStream) -> Result<Ahead, LazyError> {
        if self.is_half() {
            return Ok(Ahead::More);
        }
        let mut word = [0; 4];
        let seen = sys::peek(stream.as_fd(), &mut word);
        Ok(match seen.map_err(|source| LazyError::Start { source })? {
            None => Ahead::Nothing,
            Some(4) if i32::from_ne_bytes(word) == FINISHED => Ahead::Last,
            Some(_) => Ahead::More,
        })
    }

    fn next(&mut self, stream: &UnixStream) -> Result<Option<FromCriu>, LazyError> {
        let failed = |source| LazyError::Start { source };
        loop {
            if let Some(pid) = self.pid {
                let Some((length, fd)) = sys::receive(stream.as_fd(), &mut [0]).map_err(failed)?
                else {
                    return Ok(None);
                };
                self.pid = None;
                return match fd {
                    Some(fd) => Ok(Some(FromCriu::Task(pid, fd))),
                    None if length == 0 => Ok(Some(FromCriu::Ended)),
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
                return Ok(Some(FromCriu::Ended));
            }
            self.have += length;
            if self.have < 4 {
                continue;
            }
            self.have = 0;
            match i32::from_ne_bytes(self.word) {
                FINISHED => return Ok(Some(FromCriu::Finished)),
                ..=-1 => return Ok(Some(FromCriu::Zombie)),
                0 => {
                    return Err(LazyError::Protocol { what: "process 0" });
                }
                pid => self.pid = u32::try_from(pid).ok(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::arena::memory_file;

    /// A server with one thread that nobody has an eye on.
    fn server(
        pages: Arc<Mapping>,
        late: Arc<LatePages>,
        late_places: Vec<(PageOwner, Range<u64>, u64)>,
    ) -> Server {
        let task = Task {
            pages,
            late,
            late_places,
            plans: BTreeMap::new(),
            threads: 1,
            piece_bytes: 64 << 10,
            limit: Duration::from_secs(60),
            bell: Arc::new(sys::event_fd().unwrap()),
            partner: None,
            teller: None,
        };
        Server::new(task).unwrap()
    }

    /// Locked memory that grows elsewhere while other memory is still to come.
    #[test]
    fn locked_memory_that_grows_is_not_waited_for() {
        let Some(uffd) = sys::tests::userfaultfd() else {
            println!("SKIP locked_memory_that_grows_is_not_waited_for: no userfaultfd");
            return;
        };
        let file = memory_file(c"test-pages").unwrap();
        file.set_len(2 * PAGE).unwrap();
        file.write_all_at(&[7; 4096], 0).unwrap();
        file.write_all_at(&[9; 4096], PAGE).unwrap();
        let pages = Arc::new(Mapping::of(file.as_fd()).unwrap());
        let [locked, late, room] = [1, 1, 4].map(sys::tests::map);
        sys::tests::register(&uffd, locked);
        sys::tests::register(&uffd, late);
        let found = AtomicU64::new(0);
        let first = &pages.bytes()[..4096];
        sys::copy(uffd.as_fd(), locked, first, &found).unwrap();
        // SAFETY: a page of ours that is there.
        if unsafe { libc::mlock(locked as *const _, 4096) } != 0 {
            println!("SKIP locked_memory_that_grows_is_not_waited_for: no mlock");
            return;
        }
        let growing = thread::spawn(move || {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: a page that only this test knows goes where it has
            // reserved room.
            unsafe { libc::mremap(locked as *mut _, 4096, 4 * 4096, flags, room).addr() as u64 }
        });
        let mut plan = Plan::default();
        plan.insert(late..late + PAGE, PAGE);
        let server = server(pages, Arc::new(LatePages::new(0).unwrap()), Vec::new());
        // Its first fault, or nothing would be in the way.
        assert_eq!(
            sys::poll(&[uffd.as_raw_fd()], Some(60_000)).unwrap(),
            [true]
        );
        let owner = PageOwner::Task(1);
        server
            .take_over(vec![Replica { owner, uffd, plan }], None)
            .0
            .unwrap();
        assert_eq!(growing.join().unwrap(), room);
        let at = |address: u64| {
            // SAFETY: pages of ours, all of them there or nobody's to provide.
            unsafe { (address as *const u8).read_volatile() }
        };
        assert_eq!([at(room), at(room + PAGE), at(room + 3 * PAGE)], [7, 0, 0]);
        assert_eq!(at(late), 9);
    }

    /// A page that is missing, one that is on its way to it, and a server for both.
    fn late_page() -> Option<(u64, Arc<LatePages>, Server, Replica)> {
        let uffd = sys::tests::userfaultfd()?;
        let at = sys::tests::map(1);
        sys::tests::register(&uffd, at);
        let file = memory_file(c"test-pages").unwrap();
        file.set_len(PAGE).unwrap();
        let late = Arc::new(LatePages::new(1).unwrap());
        let owner = PageOwner::Task(1);
        let mut plan = Plan::default();
        plan.insert(at..at + PAGE, LATE_FROM);
        let pages = Arc::new(Mapping::of(file.as_fd()).unwrap());
        let places = vec![(owner, at..at + PAGE, LATE_FROM)];
        let server = server(pages, Arc::clone(&late), places);
        Some((at, late, server, Replica { owner, uffd, plan }))
    }

    fn reads(at: u64) -> thread::JoinHandle<u8> {
        // SAFETY: a page of ours, which stays mapped.
        thread::spawn(move || unsafe { (at as *const u8).read_volatile() })
    }

    #[test]
    fn what_is_late_is_asked_for_and_waited_for() {
        let Some((at, late, server, replica)) = late_page() else {
            println!("SKIP what_is_late_is_asked_for_and_waited_for: no userfaultfd");
            return;
        };
        let serving = thread::spawn(move || server.take_over(vec![replica], None).0);
        let reader = reads(at);
        assert!(late.await_wanted(Duration::from_secs(60)).unwrap());
        assert_eq!(late.take_wanted(1024), [(0, 1)]);
        assert!(!reader.is_finished() && !serving.is_finished());
        late.arrive(0, &[7; 4096]).unwrap();
        assert_eq!(reader.join().unwrap(), 7);
        let report = serving.join().unwrap().unwrap();
        assert_eq!((report.filled_pages, late.waited_faults()), (1, 1));
    }

    #[test]
    fn what_never_comes_is_not_taken_for_zeros() {
        let Some((at, late, server, replica)) = late_page() else {
            println!("SKIP what_never_comes_is_not_taken_for_zeros: no userfaultfd");
            return;
        };
        let serving = thread::spawn(move || server.take_over(vec![replica], None).0);
        let reader = reads(at);
        assert!(late.await_wanted(Duration::from_secs(60)).unwrap());
        late.lose();
        let end = serving.join().unwrap();
        assert!(
            matches!(end, Err(LazyError::NeverCame { missing: 1 })),
            "{end:?}"
        );
        // For as long as this process lives.
        assert!(!reader.is_finished());
    }
}
