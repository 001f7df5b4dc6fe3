//! Serving from a process of its own, which the one that has started it backs
//! up.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::ops::Range;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use migrate_core::late::LateRuns;
use migrate_core::wire::PageOwner;

use super::holder::{self, Holder};
use super::late::{LATE_FROM, LatePages};
use super::partner::{self, Death, Heard, ORDER_FDS, Partner, Said, Slate, Unsaid};
use super::plan::Plan;
use super::serve::{Replica, Server, Task, plans};
use super::sys::Event;
use super::{LazyError, LazyOptions, LazyReport, LazyServer, LazyServing, Told, lacking, sys};
use crate::arena::{Mapping, memory_file};
use crate::mask::{Mask, SomePages};
use crate::store::PageStore;

/// Largest plan that is accepted, in numbers: a GiB of them would be the plan
/// for a tree without two pages side by side in 128 GiB.
const PLAN_WORDS_MAX: usize = 1 << 27;

/// What has to be put in place and how, as it is handed to the keeper.
struct Order {
    lacking: Vec<(PageOwner, Range<u64>, u64)>,
    first: Vec<(PageOwner, Range<u64>)>,
    then: Vec<SomePages>,
    threads: usize,
    piece_bytes: u64,
    limit: Duration,
    late_pages: u64,
}

impl Order {
    fn write(&self) -> io::Result<File> {
        let pid = |owner: PageOwner| match owner {
            PageOwner::Task(pid) => u64::from(pid),
            // Never lazy.
            PageOwner::Shared(_) => 0,
        };
        let mut file = io::BufWriter::with_capacity(64 << 10, memory_file(c"migrate-plan")?);
        let mut put = |words: &[u64]| {
            words
                .iter()
                .try_for_each(|word| file.write_all(&word.to_le_bytes()))
        };
        put(&[
            self.threads as u64,
            self.piece_bytes,
            u64::try_from(self.limit.as_millis()).unwrap_or(u64::MAX),
            self.late_pages,
            self.lacking.len() as u64,
            self.first.len() as u64,
            self.then.len() as u64,
        ])?;
        for (owner, range, from) in &self.lacking {
            put(&[pid(*owner), range.start, range.end, *from])?;
        }
        for (owner, range) in &self.first {
            put(&[pid(*owner), range.start, range.end])?;
        }
        for some in &self.then {
            put(&[pid(some.owner), some.base])?;
            put(&some.pages.0)?;
        }
        Ok(file.into_inner()?)
    }

    fn read(mut file: File) -> io::Result<Self> {
        let bytes = usize::try_from(file.metadata()?.len()).map_err(io::Error::other)?;
        if bytes > PLAN_WORDS_MAX * 8 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        file.rewind()?;
        let mut raw = Vec::with_capacity(bytes);
        file.read_to_end(&mut raw)?;
        let mut words = raw
            .chunks_exact(8)
            .map(|word| word.try_into().map_or(0, u64::from_le_bytes));
        let mut next = || words.next().ok_or(io::ErrorKind::UnexpectedEof);
        let task = |word: u64| {
            u32::try_from(word)
                .map(PageOwner::Task)
                .map_err(io::Error::other)
        };
        let mut order = Self {
            threads: usize::try_from(next()?).map_err(io::Error::other)?,
            piece_bytes: next()?,
            limit: Duration::from_millis(next()?),
            late_pages: next()?,
            lacking: Vec::new(),
            first: Vec::new(),
            then: Vec::new(),
        };
        let (lacking, first, then) = (next()?, next()?, next()?);
        for _ in 0..lacking {
            let (owner, start, end) = (task(next()?)?, next()?, next()?);
            order.lacking.push((owner, start..end, next()?));
        }
        for _ in 0..first {
            order.first.push((task(next()?)?, next()?..next()?));
        }
        for _ in 0..then {
            let (owner, base) = (task(next()?)?, next()?);
            let mut pages = Mask::default();
            for word in &mut pages.0 {
                *word = next()?;
            }
            order.then.push(SomePages { owner, base, pages });
        }
        Ok(order)
    }
}

/// A process that will serve memory, as the one that has started it sees it.
///
/// It is ended when dropped before [`Keeper::serve`].
#[derive(Debug)]
pub struct Keeper {
    socket: OwnedFd,
    child: Option<Child>,
    /// Stands for it: its descriptors may outlive it.
    pidfd: OwnedFd,
}

impl Keeper {
    /// Starts it: `command` must call [`keep`]. It gets a session of its own and
    /// the connection to this process as its standard input.
    ///
    /// # Errors
    ///
    /// It cannot be started.
    pub fn start(mut command: Command) -> Result<Self, LazyError> {
        let failed = |source| LazyError::Start { source };
        let (ours, theirs) = Partner::pair().map_err(failed)?;
        command
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .current_dir("/");
        // SAFETY: one system call between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                Ok(())
            });
        }
        let mut child = command.spawn().map_err(failed)?;
        let pid = rustix::process::Pid::from_child(&child);
        match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self {
                socket: ours,
                child: Some(child),
                pidfd,
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(failed(error.into()))
            }
        }
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> i32 {
        let pid = self.child.as_ref().map_or(0, Child::id);
        pid.cast_signed()
    }

    /// Gives it its order; see [`LazyServer::start`]. `late` are pages that are
    /// not on this host yet: while some are, the keeper gives up when this process
    /// ends. `hold` is a descriptor that stays open until all memory is in place,
    /// whoever sees to that.
    ///
    /// # Errors
    ///
    /// A page is not in store, or the process has ended.
    pub fn serve(
        mut self,
        server: LazyServer,
        pages: &PageStore,
        plan: &[(PageOwner, Range<u64>)],
        options: LazyOptions,
        (late, late_runs): (Arc<LatePages>, &LateRuns),
        hold: Option<OwnedFd>,
    ) -> Result<LazyServing, LazyError> {
        let failed = |source| LazyError::Start { source };
        let order = Order {
            late_pages: late.pages(),
            lacking: lacking(pages, late_runs, plan)?,
            first: options.first,
            then: options.then,
            threads: options.threads,
            piece_bytes: options.piece_bytes,
            limit: options.limit,
        };
        let file = match pages.file() {
            Ok(file) => file.try_clone_to_owned(),
            // There are no pages.
            Err(_) => memory_file(c"migrate-pages").map(OwnedFd::from),
        };
        let file = file.map_err(failed)?;
        let (slate, slate_file) = Slate::new().map_err(failed)?;
        let hold = match hold {
            Some(hold) => hold,
            None => File::open("/dev/null").map_err(failed)?.into(),
        };
        let bell = Arc::new(sys::event_fd().map_err(failed)?);
        let (teller, told) = mpsc::channel();
        let socket = self.socket.try_clone().map_err(failed)?;
        let other = self.socket.try_clone().map_err(failed)?;
        let pidfd = self.pidfd.try_clone().map_err(failed)?;
        let keeper = self.pidfd.try_clone().map_err(failed)?;
        let child = self.child.take();
        // CRIU begins meanwhile: it needs neither the order nor what both make of it before
        // it has the first task.
        let backup = move || {
            let said = order.write().and_then(|order_file| {
                let [late_file, arrived, wanted] = late.fds();
                let fds: [_; ORDER_FDS] = [
                    server.listener.as_fd(),
                    file.as_fd(),
                    order_file.as_fd(),
                    slate_file.as_fd(),
                    late_file,
                    arrived,
                    wanted,
                    hold.as_fd(),
                ];
                partner::say(socket.as_fd(), &Said::Order, &fds)
            });
            if let Err(source) = said {
                let gone = matches!(
                    source.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                );
                let error = if gone {
                    LazyError::Lost
                } else {
                    failed(source)
                };
                // Nobody may want to know.
                let _ = teller.send(Told::End(Err(error), Vec::new()));
                if let Some(mut child) = child {
                    let _ = child.kill();
                    let _ = child.wait();
                }
                return;
            }
            // CRIU has it by another descriptor, once the keeper has its own.
            drop((server, slate_file));
            let guard = Guard {
                socket,
                keeper,
                holder: None,
                heard: 0,
                slate,
                file,
                late_places: late_places(&order.lacking),
                late,
                _hold: hold,
                threads: order.threads,
                piece_bytes: order.piece_bytes,
                limit: order.limit,
                unplanned: Some((order.lacking, order.first, order.then)),
                plans: BTreeMap::new(),
                replicas: BTreeMap::new(),
                complete: BTreeMap::new(),
                criu: None,
                handed_over: false,
                runs: false,
                held: Vec::new(),
                child,
            };
            guard.run(&teller);
        };
        thread::Builder::new()
            .name("lazy-guard".to_owned())
            .spawn(backup)
            .map_err(failed)?;
        Ok(LazyServing {
            told: Mutex::new(told),
            handed_over: false,
            bell,
            keeper: Some((other, pidfd)),
            held: Vec::new(),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        // It has no order: the end of the connection ends it, and this is
        // faster.
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// What tasks lack, what of that comes first, and what after that.
type Unplanned = (
    Vec<(PageOwner, Range<u64>, u64)>,
    Vec<(PageOwner, Range<u64>)>,
    Vec<SomePages>,
);

/// The account that is kept beside the server's own.
struct Guard {
    socket: OwnedFd,
    /// Stands for the keeper.
    keeper: OwnedFd,
    /// Stands for who has the same descriptors.
    holder: Option<OwnedFd>,
    /// Events that the keeper has passed on.
    heard: u64,
    slate: Slate,
    file: OwnedFd,
    late: Arc<LatePages>,
    late_places: Vec<(PageOwner, Range<u64>, u64)>,
    _hold: OwnedFd,
    threads: usize,
    piece_bytes: u64,
    limit: Duration,
    /// What plans are made of when the first task has come: until then the keeper needs the
    /// CPU for its own.
    unplanned: Option<Unplanned>,
    plans: BTreeMap<PageOwner, Plan>,
    replicas: BTreeMap<u64, Replica>,
    /// Address spaces that lack nothing any more. The keeper serves them until
    /// it has heard that they are closed here, and they may fork until then.
    complete: BTreeMap<u64, PageOwner>,
    /// CRIU's connection, until it has said that the tree runs.
    criu: Option<UnixStream>,
    handed_over: bool,
    runs: bool,
    /// What must stay open until a copy that does not run is dead.
    held: Vec<OwnedFd>,
    child: Option<Child>,
}

impl Guard {
    fn run(mut self, teller: &mpsc::Sender<Told>) {
        let end = self.listen(teller);
        // Closing them would turn what is missing into zeros.
        let replicas = std::mem::take(&mut self.replicas);
        let held = if self.runs {
            std::mem::forget(replicas);
            if matches!(end, Err(LazyError::Lost)) {
                // What could not be taken from the holder stays open there as long as
                // this connection does.
                std::mem::forget(self.socket.try_clone());
            }
            Vec::new()
        } else {
            let replicas = replicas.into_values().map(|replica| replica.uffd);
            let mut held = std::mem::take(&mut self.held);
            held.extend(replicas);
            held
        };
        // Nobody may want to know.
        let _ = teller.send(Told::End(end, held));
        if let Some(child) = &mut self.child {
            let _ = child.wait();
        }
    }

    fn listen(&mut self, teller: &mpsc::Sender<Told>) -> Result<LazyReport, LazyError> {
        let failed = |source| LazyError::Start { source };
        loop {
            let fds = [self.socket.as_raw_fd(), self.keeper.as_raw_fd()];
            let ready = sys::poll(&fds, None).map_err(failed)?;
            // Whatever it has said before its end is heard.
            let heard = partner::hear(self.socket.as_fd(), false);
            match heard.map_err(failed)? {
                Heard::Said(Said::HandedOver, _) => {
                    self.handed_over = true;
                    let _ = teller.send(Told::HandedOver);
                }
                Heard::Said(Said::End(report), _) => return Ok(report),
                Heard::Said(Said::Failed(why), _) => return Err(LazyError::Keeper { why }),
                Heard::Said(said, fds) => self.note(&said, fds)?,
                Heard::Nothing if ready[1] => return self.take_over(),
                Heard::Nothing => {}
                Heard::Gone => return self.take_over(),
            }
        }
    }

    /// Does what the server has done.
    fn note(&mut self, said: &Said, mut fds: Vec<OwnedFd>) -> Result<(), LazyError> {
        let unknown = LazyError::Protocol {
            what: "a message of the memory keeper",
        };
        if matches!(
            said,
            Said::Fork { .. } | Said::Remap { .. } | Said::Remove { .. }
        ) {
            self.heard += 1;
        }
        match *said {
            Said::Holder => self.holder = fds.pop(),
            Said::Criu => self.criu = fds.pop().map(UnixStream::from),
            Said::Task { id, pid } => {
                let owner = PageOwner::Task(pid);
                let uffd = fds.pop().ok_or(unknown)?;
                if let Some((lacking, first, then)) = self.unplanned.take() {
                    self.plans = plans(lacking, first, then);
                }
                let plan = self.plans.remove(&owner).unwrap_or_default();
                self.replicas.insert(id, Replica { owner, uffd, plan });
            }
            Said::Fork { id, parent } => {
                let uffd = fds.pop().ok_or(LazyError::Lost)?;
                let (owner, plan) = match self.replicas.get(&parent) {
                    Some(parent) => (parent.owner, parent.plan.clone()),
                    None => match self.complete.get(&parent) {
                        Some(&owner) => (owner, Plan::default()),
                        None => {
                            std::mem::forget(uffd);
                            return Err(unknown);
                        }
                    },
                };
                self.replicas.insert(id, Replica { owner, uffd, plan });
            }
            Said::Remap {
                id,
                from,
                to,
                bytes,
            } => {
                if let Some(replica) = self.replicas.get_mut(&id) {
                    replica.plan.shift(from, to, bytes);
                }
            }
            Said::Remove { id, start, end } => {
                if let Some(replica) = self.replicas.get_mut(&id) {
                    replica.plan.take(start..end);
                }
            }
            Said::Runs => {
                self.runs = true;
                self.criu = None;
            }
            Said::Complete { id } => {
                if let Some(replica) = self.replicas.remove(&id) {
                    self.complete.insert(id, replica.owner);
                }
                // Should it be gone, that is heard next.
                let _ = partner::say(self.socket.as_fd(), said, &[]);
            }
            Said::Order | Said::HandedOver | Said::End(_) | Said::Failed(_) => return Err(unknown),
        }
        Ok(())
    }

    /// Does what the keeper has read of and died before it could pass it on.
    fn catch_up(&mut self, unsaid: &Unsaid) -> Result<(), LazyError> {
        let mut last_id = unsaid.last_id;
        let events = unsaid.events.iter().filter_map(|event| {
            let said = Said::of(event, unsaid.space, &mut last_id)?;
            Some((said, event))
        });
        for ((said, event), number) in events.zip(unsaid.told..) {
            if number < self.heard {
                continue;
            }
            let fds = match (event, &self.holder) {
                (Event::Fork(fd), Some(holder)) => {
                    let fetched = holder::fetch(holder.as_fd(), *fd);
                    vec![fetched.map_err(|_| LazyError::Lost)?]
                }
                (Event::Fork(_), None) => return Err(LazyError::Lost),
                _ => Vec::new(),
            };
            self.note(&said, fds)?;
        }
        Ok(())
    }

    /// The keeper has died, or does without this process.
    fn take_over(&mut self) -> Result<LazyReport, LazyError> {
        if self.slate.has(Slate::ALONE) {
            // It serves on; what is held here would only be in its way.
            self.replicas.clear();
            return Err(LazyError::Unguarded);
        }
        // What CRIU says next has to be heard here. It must not have said anything
        // that nobody living knows of, and nor must the tree have done so.
        let hears = self.criu.is_some() && self.handed_over && !self.slate.has(Slate::HEARING);
        if !(self.runs || hears) {
            return Err(LazyError::Lost);
        }
        if let Some(unsaid) = self.slate.unsaid() {
            self.catch_up(&unsaid)?;
        }
        // All of them are here now.
        sys::hang_up(self.socket.as_fd());
        let failed = |source| LazyError::Start { source };
        let server = Server::new(Task {
            pages: Arc::new(Mapping::of(self.file.as_fd()).map_err(failed)?),
            late: Arc::clone(&self.late),
            late_places: std::mem::take(&mut self.late_places),
            plans: BTreeMap::new(),
            threads: self.threads,
            piece_bytes: self.piece_bytes,
            limit: self.limit,
            bell: Arc::new(sys::event_fd().map_err(failed)?),
            partner: None,
            teller: None,
        })
        .map_err(failed)?;
        let replicas = std::mem::take(&mut self.replicas);
        let replicas = replicas.into_values().collect();
        let (end, held) = server.take_over(replicas, self.criu.as_ref());
        self.held = held;
        end
    }
}

/// The parts of a plan that are not on this host yet, by their numbers.
fn late_places(lacking: &[(PageOwner, Range<u64>, u64)]) -> Vec<(PageOwner, Range<u64>, u64)> {
    let mut places: Vec<_> = lacking
        .iter()
        .filter(|(_, _, from)| *from >= LATE_FROM)
        .cloned()
        .collect();
    places.sort_by_key(|(_, _, from)| *from);
    places
}

/// Ignored by the keeper: it ends when its work is done.
const DEAF_TO: [libc::c_int; 5] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGPIPE,
];

/// The keeper: serves what the process on the other side of standard input
/// orders, also when that has ended meanwhile. Blocks until all memory is in
/// place.
///
/// # Errors
///
/// As [`LazyServing::wait`]. After an error with a [`LazyError::help`] the tree
/// has to be killed before this process ends.
pub fn keep() -> Result<LazyReport, LazyError> {
    keep_until(None)
}

/// The same with an end, for tests: nobody could hit these moments from outside.
#[doc(hidden)]
pub fn keep_until(death: Option<Death>) -> Result<LazyReport, LazyError> {
    let failed = |source| LazyError::Start { source };
    for signal in DEAF_TO {
        // SAFETY: ignoring a signal installs no handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    // SAFETY: a name that ends with a zero.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"memory-keeper".as_ptr()) };
    // Where that is not allowed, it is killed as late as others are.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    let socket = io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let unknown = LazyError::Protocol {
        what: "an order of the agent",
    };
    let mut fds = match partner::hear(socket.as_fd(), true).map_err(failed)? {
        Heard::Said(Said::Order, fds) => fds.into_iter(),
        Heard::Gone => return Err(LazyError::RestoreEnded),
        Heard::Said(..) | Heard::Nothing => return Err(unknown),
    };
    let mut next = || fds.next();
    let (Some(listener), Some(pages), Some(order), Some(slate)) = (next(), next(), next(), next())
    else {
        return Err(unknown);
    };
    let (Some(late), Some(arrived), Some(wanted), Some(_hold)) = (next(), next(), next(), next())
    else {
        return Err(unknown);
    };
    // Without it the agent can go on for this process as well, but not at any moment.
    let holder = Holder::start(socket.as_fd()).ok();
    if let Some(holder) = &holder {
        // One who has ended is noticed soon.
        let _ = partner::say(socket.as_fd(), &Said::Holder, &[holder.pidfd()]);
    }
    let order = Order::read(File::from(order)).map_err(failed)?;
    let late = LatePages::of(late, order.late_pages, [arrived, wanted]).map_err(failed)?;
    let server = Server::new(Task {
        pages: Arc::new(Mapping::of(pages.as_fd()).map_err(failed)?),
        late: Arc::new(late),
        late_places: late_places(&order.lacking),
        plans: plans(order.lacking, order.first, order.then),
        threads: order.threads,
        piece_bytes: order.piece_bytes,
        limit: order.limit,
        bell: Arc::new(sys::event_fd().map_err(failed)?),
        partner: Some(Partner {
            socket,
            slate: Slate::of(slate.as_fd()).map_err(failed)?,
            death,
        }),
        teller: None,
    })
    .map_err(failed)?;
    server.serve(&UnixListener::from(listener))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_is_read_as_it_was_written() {
        let task = PageOwner::Task(7);
        let order = Order {
            lacking: vec![(task, 4096..8192, 1), (task, 1 << 40..1 << 41, 2 << 20)],
            first: vec![(task, 4096..8192)],
            then: vec![SomePages {
                owner: task,
                base: 2 << 20,
                pages: Mask([1, 2, 3, 4, 5, 6, 7, u64::MAX]),
            }],
            threads: 3,
            piece_bytes: 5,
            limit: Duration::from_millis(6),
            late_pages: 8,
        };
        let written = order.write().unwrap();
        let read = Order::read(written.try_clone().unwrap()).unwrap();
        assert_eq!(read.lacking, order.lacking);
        assert_eq!((read.first, read.then), (order.first, order.then));
        assert_eq!(
            (read.threads, read.piece_bytes, read.limit, read.late_pages),
            (3, 5, order.limit, 8)
        );
        let cut = written.try_clone().unwrap();
        cut.set_len(60).unwrap();
        assert!(Order::read(cut).is_err());
    }

    fn guard() -> (Guard, OwnedFd) {
        let (ours, theirs) = Partner::pair().unwrap();
        let file = || OwnedFd::from(memory_file(c"test").unwrap());
        let guard = Guard {
            socket: ours,
            keeper: file(),
            holder: None,
            heard: 0,
            slate: Slate::new().unwrap().0,
            file: file(),
            late: Arc::new(LatePages::new(0).unwrap()),
            late_places: Vec::new(),
            _hold: file(),
            threads: 1,
            piece_bytes: 1,
            limit: Duration::from_secs(1),
            unplanned: None,
            plans: BTreeMap::new(),
            replicas: BTreeMap::new(),
            complete: BTreeMap::new(),
            criu: None,
            handed_over: true,
            runs: true,
            held: Vec::new(),
            child: None,
        };
        (guard, theirs)
    }

    /// The keeper closes a complete address space once it has heard from here,
    /// and what is forked off until then comes with its message.
    #[test]
    fn what_is_complete_may_still_fork() {
        let (mut guard, _keeper) = guard();
        let fds = || vec![OwnedFd::from(memory_file(c"test").unwrap())];
        guard.note(&Said::Task { id: 1, pid: 7 }, fds()).unwrap();
        guard.note(&Said::Complete { id: 1 }, Vec::new()).unwrap();
        let fork = |id, parent| Said::Fork { id, parent };
        guard.note(&fork(2, 1), fds()).unwrap();
        let child = &guard.replicas[&2];
        assert_eq!(child.owner, PageOwner::Task(7));
        assert!(child.plan.is_empty());
        assert!(matches!(
            guard.note(&fork(4, 3), fds()),
            Err(LazyError::Protocol { .. })
        ));
    }
}
