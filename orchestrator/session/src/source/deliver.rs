//! Pages that go over after the commit: read from the fenced tree when their turn has
//! come, sent while the copy runs.

use std::ops::Range;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use migrate_channel::{Frame, Receiver, Sender};
use migrate_core::journal::Stage;
use migrate_core::late::{Deliveries, FOLLOWING_RANGES_MAX, LateRun, LateRuns, RUNS_MAX};
use migrate_core::report::{Postcopy, counted};
use migrate_core::stream::Bucket;
use migrate_core::wire::{Message, PAGE_BYTES, PageOwner, PageRun};
use migrate_criu::PARENT;
use migrate_memory::{FrozenMemory, FrozenPages, LATE_LIMIT, Listed, MemoryError, TaskRanges};
use migrate_proc::HoldDown;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::dump::{DumpSinkError, Outgoing, Stop};
use super::{Migration, micros, not_yet};
use crate::error::Error;

/// What this side waits for once it has sent everything.
const AWAITED: &str = "the word that all memory has arrived";

/// Pages in one frame: small enough that what is wanted follows soon.
const FRAME_PAGES: u64 = 32;

/// Pages on their way at most: 1 MiB, which is 8 ms of a gigabit network, the time
/// that a page which is wanted queues behind others.
const WINDOW_PAGES: u64 = 256;

/// What goes over sooner is over before systemd has been told anything.
const KEEP_AFTER: Duration = Duration::from_secs(1);

/// Before the copy runs nothing is due; the steps of the migration have limits of
/// their own.
const BEFORE_LIMIT: Duration = Duration::from_secs(3600);

/// Which pages of the frozen tree follow after the commit.
pub(super) struct Following {
    runs: LateRuns,
    memory: FrozenMemory,
    /// What is marked clean and follows.
    changed: TaskRanges,
    /// What follows, when somebody wants to compare.
    pub(super) listed: Option<Listed>,
}

/// What the tree has written since the last round, looked for by another thread.
pub(super) enum Changed {
    Looking {
        task: JoinHandle<Result<TaskRanges, MemoryError>>,
        _stop: Stop,
    },
    Known(TaskRanges),
}

impl Default for Changed {
    fn default() -> Self {
        Self::Known(TaskRanges::new())
    }
}

impl Changed {
    fn look(pages: FrozenPages) -> Self {
        let stop = Stop::default();
        let flag = stop.flag();
        Self::Looking {
            task: tokio::task::spawn_blocking(move || pages.written(&flag)),
            _stop: stop,
        }
    }

    /// What it is. CRIU must not look at the marks before.
    pub(super) async fn known(self) -> Result<TaskRanges, MemoryError> {
        match self {
            Self::Known(changed) => Ok(changed),
            Self::Looking { task, _stop } => task.await.unwrap_or(Err(MemoryError::Stopped)),
        }
    }
}

impl Following {
    /// Nothing yet: pages of `memory`, of which `changed` is marked clean.
    pub(super) fn of(memory: FrozenMemory, changed: TaskRanges, verify: bool) -> Self {
        Self {
            runs: LateRuns::default(),
            memory,
            changed,
            listed: verify.then(Listed::default),
        }
    }

    /// Notes a run that CRIU has read, if it may come late; its head, to be sent in its
    /// place.
    fn instead(&mut self, run: &PageRun) -> Result<Option<PageRun>, DumpSinkError> {
        let range = run.vaddr..run.vaddr + run.pages * PAGE_BYTES as u64;
        let may_wait = run.flags & PageRun::LAZY != 0
            && run.flags & PageRun::PRESENT != 0
            && self.runs.runs().len() < RUNS_MAX
            && self.memory.may_wait(run.owner, &range);
        if !may_wait {
            return Ok(None);
        }
        self.add(*run)?;
        let flags = run.flags & !PageRun::PRESENT | PageRun::LATE;
        Ok(Some(PageRun { flags, ..*run }))
    }

    /// A run that CRIU has read and does not call lazy, listed as in store instead, if
    /// all of it may follow all the same.
    fn as_stored(&self, run: &PageRun) -> Option<PageRun> {
        let range = run.vaddr..run.vaddr + run.pages * PAGE_BYTES as u64;
        let waits = run.flags & (PageRun::LAZY | PageRun::PRESENT) == PageRun::PRESENT
            && self.runs.runs().len() < RUNS_MAX
            && self.memory.waits(run.owner, &range);
        let flags = run.flags & !PageRun::PRESENT | PARENT;
        waits.then_some(PageRun { flags, ..*run })
    }

    /// Notes what follows of a run that CRIU has listed as in store.
    fn of_stored(&mut self, run: &PageRun) -> Result<Vec<PageRun>, DumpSinkError> {
        let PageOwner::Task(pid) = run.owner else {
            return Ok(Vec::new());
        };
        let page = PAGE_BYTES as u64;
        let end = run.vaddr + run.pages * page;
        let changed = self.changed.get(&pid);
        let ranges = changed.map_or(&[][..], Vec::as_slice);
        let from = ranges.partition_point(|range| range.end <= run.vaddr);
        let parts: Vec<PageRun> = ranges[from..]
            .iter()
            .take_while(|range| range.start < end)
            .map(|range| {
                let (start, end) = (range.start.max(run.vaddr), range.end.min(end));
                PageRun {
                    vaddr: start,
                    pages: (end - start) / page,
                    ..*run
                }
            })
            .collect();
        for part in &parts {
            self.add(*part)?;
        }
        Ok(parts)
    }

    fn add(&mut self, run: PageRun) -> Result<(), DumpSinkError> {
        self.runs.add(&run)?;
        if let Some(listed) = &mut self.listed {
            listed.add(run)?;
        }
        Ok(())
    }

    pub(super) fn pages(&self) -> u64 {
        self.runs.pages()
    }
}

impl Outgoing<'_> {
    /// Sends a part of the list, or its head alone where its content follows.
    pub(super) async fn send_or_follow(
        &mut self,
        run: PageRun,
        data: &[u8],
    ) -> Result<(), DumpSinkError> {
        let Some(following) = &mut self.following else {
            self.list(run)?;
            return Ok(self.send(run, data).await?);
        };
        if let Some(head) = following.instead(&run)? {
            self.pages += run.pages;
            return Ok(self.sender.pages(&head, &[]).await?);
        }
        let (run, data, parts) = if run.flags & PARENT != 0 {
            (run, data, following.of_stored(&run)?)
        } else if let Some(stored) = following.as_stored(&run) {
            following.add(stored)?;
            (stored, &[][..], vec![stored])
        } else {
            (run, data, Vec::new())
        };
        for parts in parts.chunks(FOLLOWING_RANGES_MAX) {
            let pages = parts
                .iter()
                .map(|part| (part.vaddr / PAGE_BYTES as u64, part.pages));
            let follows = Message::Follows {
                owner: run.owner,
                pages: pages.collect(),
            };
            self.sender.control(&follows).await?;
        }
        self.following_pages += parts.iter().map(|part| part.pages).sum::<u64>();
        for part in run.without(&parts) {
            self.list(part)?;
        }
        Ok(self.send(run, data).await?)
    }
}

impl Migration {
    /// The tree stands still: begins to look for what follows, where something does.
    pub(super) async fn look_for_changed(&mut self) -> Result<(), Error> {
        if !self.postcopies {
            return Ok(());
        }
        let tree = self.plan()?.tree.frozen()?;
        let pids = tree.processes.iter().map(|one| one.pid.unsigned_abs());
        let pids: Vec<u32> = pids.collect();
        let verify = self.request.choices.verify;
        self.held_memory = migrate_criu::held(&pids, verify).await;
        if verify && self.held_memory.is_none() {
            return Err(Error::Changed(
                "the tree's mappings cannot be read, to tell which may be compared later"
                    .to_owned(),
            ));
        }
        if let Some(precopy) = &self.precopy {
            let held = self.held_memory.as_ref();
            self.changed = Changed::look(precopy.frozen_pages(&pids, held)?);
        }
        Ok(())
    }
}

/// The sending, by a task of its own: it goes on whatever becomes of the first
/// connection. Dropped, it ends, and with it a copy that lacks pages.
#[derive(Debug)]
pub(super) struct Delivery {
    pages: u64,
    begin: watch::Sender<bool>,
    task: JoinHandle<Result<Postcopy, Error>>,
    /// What it has come to, once somebody has looked.
    ended: Option<Result<Postcopy, Error>>,
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Delivery {
    /// Answers from now on for what is asked for, and sends the rest when told to.
    pub(super) fn start(
        peer: String,
        following: Following,
        (sender, receiver): (Sender, Receiver),
        limit_bytes_per_s: Option<u64>,
    ) -> Self {
        let (begin, begun) = watch::channel(false);
        let pages = following.pages();
        let work = Work {
            peer,
            left: Deliveries::of(pages),
            following,
            buffer: BytesMut::new(),
            sender,
            receiver,
            sent_pages: 0,
            came_pages: 0,
            limit_bytes_per_s,
        };
        Self {
            pages,
            begin,
            task: tokio::spawn(work.deliver(begun)),
            ended: None,
        }
    }

    /// The copy may run: everything goes.
    pub(super) fn begin(&self) {
        self.begin.send_replace(true);
    }

    /// Before the commit: it goes on, or nothing is left to send. The copy touches pages
    /// while CRIU makes it, and where few come late these may be all.
    pub(super) async fn holds(&mut self) -> Result<(), Error> {
        if self.ended.is_none() && self.task.is_finished() {
            let end = self.end().await;
            self.ended = Some(end);
        }
        match &self.ended {
            Some(Err(error)) => Err(Error::Changed(format!(
                "the connection for memory that is to follow has ended: {}",
                error.chain()
            ))),
            Some(Ok(_)) | None => Ok(()),
        }
    }

    async fn end(&mut self) -> Result<Postcopy, Error> {
        if let Some(ended) = self.ended.take() {
            return ended;
        }
        match (&mut self.task).await {
            Ok(end) => end,
            Err(_) => Err(not_yet("the delivery of pages")),
        }
    }
}

struct Work {
    peer: String,
    following: Following,
    buffer: BytesMut,
    left: Deliveries,
    sender: Sender,
    receiver: Receiver,
    sent_pages: u64,
    came_pages: u64,
    /// Held to by what nobody waits for.
    limit_bytes_per_s: Option<u64>,
}

impl Work {
    async fn deliver(mut self, mut begun: watch::Receiver<bool>) -> Result<Postcopy, Error> {
        self.sender.set_deadline(LATE_LIMIT);
        let mut since: Option<Instant> = None;
        let mut bucket = None;
        let mut next_at = Instant::now();
        loop {
            let room = self.sent_pages - self.came_pages < WINDOW_PAGES;
            let goes_on = since.is_some() && self.left.left_pages() > 0;
            let limit = match since {
                Some(_) => LATE_LIMIT,
                None => BEFORE_LIMIT,
            };
            let wanted = room && self.left.is_wanted();
            tokio::select! {
                biased;
                frame = self.receiver.next(limit) => {
                    if let Some(waited_faults) = self.hear(frame)? {
                        return Ok(Postcopy {
                            pages: self.following.pages(),
                            bytes: self.sender.sent_bytes(),
                            waited_faults,
                            took_us: since.map_or(0, |since| micros(since.elapsed())),
                        });
                    }
                }
                () = std::future::ready(()), if wanted => {
                    self.send(true).await?;
                }
                changed = begun.changed(), if since.is_none() => {
                    if changed.is_err() {
                        return Err(not_yet("the word that the copy may run"));
                    }
                    let now = Instant::now();
                    since = Some(now);
                    next_at = now;
                    bucket = self.limit_bytes_per_s.map(|rate| Bucket::new(rate, 0));
                }
                () = tokio::time::sleep_until(next_at.into()), if room && goes_on => {
                    let bytes = self.send(false).await?;
                    if let (Some(bucket), Some(since)) = (&mut bucket, since) {
                        let wait_us = bucket.take(bytes, micros(since.elapsed()));
                        next_at = Instant::now() + Duration::from_micros(wait_us);
                    }
                }
            }
        }
    }

    /// Takes in what the destination says; the faults that have waited, when it
    /// has everything.
    fn hear(
        &mut self,
        frame: Result<Frame, migrate_channel::ChannelError>,
    ) -> Result<Option<u64>, Error> {
        let frame = frame.map_err(|error| crate::inbox::broken(&self.peer, error, AWAITED))?;
        match frame {
            Frame::Control(Message::Want { pages, came }) if came <= self.sent_pages => {
                self.came_pages = self.came_pages.max(came);
                for (first, count) in pages {
                    self.left.want(first..first.saturating_add(count));
                }
                Ok(None)
            }
            Frame::Control(Message::Arrived { waited }) if self.left.left_pages() == 0 => {
                Ok(Some(waited))
            }
            Frame::Control(Message::Failed(error)) => Err(error.into()),
            Frame::Control(other) => Err(crate::inbox::unexpected(&self.peer, &other, AWAITED)),
            Frame::Pages { .. } | Frame::Image { .. } | Frame::Packet(_) => {
                Err(Error::Unexpected {
                    peer: self.peer.clone(),
                    got: "pages, an image or a packet".to_owned(),
                    awaited: AWAITED,
                })
            }
        }
    }

    /// Sends the next pages; how many bytes.
    async fn send(&mut self, only_wanted: bool) -> Result<usize, Error> {
        let next = if only_wanted {
            self.left.next_wanted(FRAME_PAGES)
        } else {
            self.left.next(FRAME_PAGES)
        };
        let Some(numbers) = next else { return Ok(0) };
        let broken = |source| Error::Channel {
            peer: self.peer.clone(),
            source,
        };
        let parts: Vec<LateRun> = self.following.runs.numbered(numbers).collect();
        let mut bytes = 0;
        for parts in parts.chunk_by(|one, next| one.owner == next.owner) {
            let owner = parts[0].owner;
            let pieces: Vec<Range<u64>> = parts.iter().map(LateRun::range).collect();
            let memory = &self.following.memory;
            let content = memory.read(owner, &pieces, &mut self.buffer)?;
            let mut rest = &content[..];
            for part in parts {
                let length = usize::try_from(part.pages).unwrap_or(0) * PAGE_BYTES;
                let (data, after) = rest
                    .split_at_checked(length)
                    .ok_or_else(|| not_yet("a page of the tree"))?;
                rest = after;
                let run = PageRun {
                    owner,
                    vaddr: part.vaddr,
                    pages: part.pages,
                    flags: PageRun::PRESENT | PageRun::LAZY,
                };
                self.sender.pages(&run, data).await.map_err(broken)?;
                self.sent_pages += part.pages;
                bytes += data.len();
            }
        }
        self.sender.flush().await.map_err(broken)?;
        Ok(bytes)
    }
}

impl Migration {
    /// The copy may run: what it lacks goes over.
    pub(super) fn begin_delivery(&self) {
        if let Some(delivery) = &self.delivery {
            delivery.begin();
        }
    }

    /// The copy has run, and something of it is still here. Whoever settles this record
    /// when this process has died removes the tree unasked: the destination may not be
    /// reached by then or, after a reset, know of nothing.
    fn note_gone(&mut self) {
        if let Some(journal) = &mut self.journal
            && let Err(error) = journal.stage(Stage::Done)
        {
            tracing::warn!(error = %error.chain(), "could not note that the tree has gone");
        }
    }

    /// The copy has run: waits until it has all its memory.
    pub(super) async fn deliver(&mut self) -> Result<String, Error> {
        if self.delivery.is_none() {
            return Ok(String::new());
        }
        self.note_gone();
        self.never_to_run_again();
        self.deliver_all().await
    }

    async fn deliver_all(&mut self) -> Result<String, Error> {
        let Some(mut delivery) = self.delivery.take() else {
            return Ok(String::new());
        };
        delivery.begin();
        // The destination need not wait for that to be done with its peers.
        self.end_stream().await;
        let peer = self
            .link
            .as_ref()
            .map_or_else(|| "the destination".to_owned(), |link| link.peer.clone());
        let soon = tokio::time::timeout(KEEP_AFTER, delivery.end()).await;
        let end = match soon {
            Ok(end) => end,
            Err(_) => {
                let kept = self.keep_unit();
                let end = delivery.end().await;
                self.note_kept(kept).await;
                end
            }
        };
        match end {
            Ok(postcopy) => {
                let waited = usize::try_from(postcopy.waited_faults).unwrap_or(usize::MAX);
                self.postcopy = Some(postcopy);
                Ok(format!(
                    "{} pages sent after the commit, {} waited for one",
                    postcopy.pages,
                    counted(waited, "fault")
                ))
            }
            Err(error) => Err(Error::LostMemory {
                peer,
                pages: delivery.pages,
                source: Box::new(error),
            }),
        }
    }

    /// The tree has run for the last time, and its copy still lacks memory of it: the kernel
    /// is not to end it for want of memory.
    fn never_to_run_again(&self) {
        let pids: Vec<i32> = self.plan.iter().flat_map(|plan| plan.tree.pids()).collect();
        if let Err(error) = migrate_proc::never_killed_for_memory(&pids) {
            let error = crate::error::chain(&error);
            tracing::warn!(
                error,
                "the kernel may kill what is left of the tree for memory"
            );
        }
    }

    /// Has systemd keep what is left of the tree, which may take a while.
    fn keep_unit(&self) -> JoinHandle<Result<(), String>> {
        let held = self.supervisor.as_ref().and_then(HoldDown::record);
        tokio::task::spawn_blocking(move || {
            let kept = HoldDown::from_record(held).keep();
            kept.map_err(|error| crate::error::chain(&error))
        })
    }

    async fn note_kept(&mut self, kept: JoinHandle<Result<(), String>>) {
        if let Err(why) = kept.await.unwrap_or_else(|error| Err(error.to_string())) {
            self.reporter.warn(format!(
                "systemd may end what is left of the tree here before its copy has all memory: {why}"
            ));
        }
    }

    /// An end without an answer must not be that of a copy which may run: what it
    /// lacks goes over all the same.
    pub(super) async fn deliver_in_doubt(&mut self) {
        // It may yet run here again.
        if let Err(error) = self.deliver_all().await {
            self.reporter.warn(error.chain());
        }
    }
}

#[cfg(test)]
mod tests {
    use migrate_channel::Connection;

    use super::*;

    const SOON: Duration = Duration::from_secs(60);

    #[repr(align(4096))]
    struct Page([u8; PAGE_BYTES]);

    static PAGE: Page = Page([7; PAGE_BYTES]);

    /// A delivery of one page, and the connection that it is to go over.
    fn one_page() -> (Delivery, Connection) {
        let hello = crate::hello("m1");
        let (source, destination) = Connection::pair(hello.clone(), hello);
        let pid = std::process::id();
        let memory = FrozenMemory::open([pid.cast_signed()], None).unwrap();
        let mut following = Following::of(memory, TaskRanges::new(), false);
        // Of this very program, which stays where it is.
        let at = std::ptr::from_ref(&PAGE).addr() as u64;
        let run = PageRun {
            owner: PageOwner::Task(pid),
            vaddr: at,
            pages: 1,
            flags: PageRun::PRESENT | PageRun::LAZY,
        };
        assert!(following.instead(&run).unwrap().is_some());
        let lane = (source.sender, source.receiver);
        let delivery = Delivery::start("host2".to_owned(), following, lane, None);
        (delivery, destination)
    }

    async fn over(delivery: &Delivery) {
        let ended = async {
            while !delivery.task.is_finished() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON, ended).await.unwrap();
    }

    #[tokio::test]
    async fn all_that_follows_may_have_come_before_the_commit() {
        let (mut delivery, mut destination) = one_page();
        delivery.holds().await.unwrap();
        let want = Message::Want {
            pages: vec![(0, 1)],
            came: 0,
        };
        destination.sender.control(&want).await.unwrap();
        let frame = destination.receiver.next(SOON).await.unwrap();
        assert!(
            matches!(&frame, Frame::Pages { run, data }
            if run.pages == 1 && data[..] == PAGE.0),
            "{frame:?}"
        );
        let arrived = Message::Arrived { waited: 1 };
        destination.sender.control(&arrived).await.unwrap();
        destination.sender.close().await.unwrap();
        over(&delivery).await;
        delivery.holds().await.unwrap();
        delivery.begin();
        let postcopy = delivery.end().await.unwrap();
        assert_eq!((postcopy.pages, postcopy.waited_faults), (1, 1));
    }

    #[tokio::test]
    async fn a_connection_that_ends_before_the_commit_is_told() {
        let (mut delivery, destination) = one_page();
        drop(destination);
        over(&delivery).await;
        let error = delivery.holds().await.unwrap_err().chain();
        assert!(error.contains("that is to follow has ended: "), "{error}");
        delivery.end().await.unwrap_err();
    }
}
